//! Hugging Face checkpoint directories.
