"""`python -m trainer`: alexnet-train, in the form that torchrun starts."""

from trainer.cli import train

if __name__ == "__main__":
    train()
