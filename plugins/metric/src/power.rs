//! The exponent that many metrics have as a parameter.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// The power that a metric's factor is raised to: any finite number, 1 by default. Other values are
/// errors of the recipe.
///
/// ```
/// use barber_metric::Power;
///
/// assert_eq!(Power::default().of(3.0), 3.0);
/// assert_eq!(Power::try_from(0.5).unwrap().of(9.0), 3.0);
/// assert!(Power::try_from(f32::NAN).is_err());
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(try_from = "f32", into = "f32")]
pub struct Power(f32);

impl Power {
    /// 0.5.
    pub const SQUARE_ROOT: Self = Self(0.5);

    /// `x` raised to the power.
    #[inline]
    pub fn of(self, x: f32) -> f32 {
        // The default is exact and free.
        if self.0 == 1.0 { x } else { x.powf(self.0) }
    }
}

impl Default for Power {
    fn default() -> Self {
        Self(1.0)
    }
}

impl TryFrom<f32> for Power {
    type Error = String;

    fn try_from(power: f32) -> Result<Self, Self::Error> {
        if power.is_finite() {
            Ok(Self(power))
        } else {
            Err(format!("the power must be a finite number, got {power}"))
        }
    }
}

impl From<Power> for f32 {
    fn from(Power(power): Power) -> Self {
        power
    }
}
