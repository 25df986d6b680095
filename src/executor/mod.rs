//! Decoder layers on dfdx.
