//! The LLaMA family.
