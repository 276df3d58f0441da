"""The inside of MLPs and of mixtures of experts under uniform names."""
