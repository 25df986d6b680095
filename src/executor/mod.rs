//! Decoder layers on dfdx, generic over the device; gradients come from its tape.

pub mod ops;
