"""A trained net apart from its run: its weights, and what is done with them."""
