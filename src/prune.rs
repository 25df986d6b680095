//! The loop over the layers.
