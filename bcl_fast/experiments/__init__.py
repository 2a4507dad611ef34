"""Training runs on images: the data, the autoencoder, one condition -> one record, and pictures of it."""
