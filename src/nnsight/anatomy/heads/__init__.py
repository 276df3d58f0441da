"""The heads of attention: the parts of the model's weights that are theirs, and what each adds."""
