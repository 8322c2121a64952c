"""The layouts of adapter files: how each trainer names the tensors of a layer."""
