"""`python -m trainer`: alexnet-train, in the form that torchrun starts."""

if __name__ == "__main__":
    import sys
    from pathlib import Path

    if not sys.flags.safe_path and Path(sys.path[0]) != Path(__file__).parents[1]:
        del sys.path[0]  # the current folder, where the user's own pipeline.py may lie

    from trainer.commands.train import train

    train()
