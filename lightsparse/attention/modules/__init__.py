"""Drop-in modules with PyTorch's own interfaces."""
