"""The parts of the models: transformer blocks, linear layers, autoencoder, text encoders."""
