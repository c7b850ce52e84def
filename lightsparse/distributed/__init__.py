"""A job of several ranks: Lightning strategies, launching, meshes, gradient hooks, sharded files."""
