"""megatrain from Python and notebooks: `megatrain.load`, `megatrain.Run` and `megatrain.train`."""
