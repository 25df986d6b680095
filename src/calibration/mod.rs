//! Text to token batches.
