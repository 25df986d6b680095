//! The version of this program, and the processor's instructions that it uses.

use std::fmt;

use serde::{Deserialize, Serialize};

/// The program that made a result. The same version makes the same bytes from the same inputs.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Version {
    /// Version of Barber.
    pub barber: String,
    /// Commit of the source, if the environment variable `BARBER_COMMIT` was set in the build.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub commit: Option<String>,
    /// Target triple of the build.
    #[serde(default)]
    pub target: String,
    /// Vector instructions found at run time. They determine which kernels run.
    #[serde(default)]
    pub instructions: String,
}

impl Version {
    /// The version of this program on this machine.
    pub fn current() -> Self {
        Self {
            barber: env!("CARGO_PKG_VERSION").into(),
            commit: option_env!("BARBER_COMMIT").map(Into::into),
            target: format!("{}-{}", std::env::consts::ARCH, std::env::consts::OS),
            instructions: instructions(),
        }
    }
}

impl fmt::Display for Version {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { barber, commit, target, instructions } = self;
        let commit = commit.as_ref().map_or_else(String::new, |commit| format!(" ({commit})"));
        write!(f, "barber {barber}{commit} on {target}, {instructions}")
    }
}

#[cfg(target_arch = "x86_64")]
fn instructions() -> String {
    let known = [
        ("avx512f", is_x86_feature_detected!("avx512f")),
        ("avx2", is_x86_feature_detected!("avx2")),
        ("fma", is_x86_feature_detected!("fma")),
    ];
    let found: Vec<&str> =
        known.iter().filter(|(_, there)| *there).map(|(name, _)| *name).collect();
    found.join(" ")
}

#[cfg(not(target_arch = "x86_64"))]
fn instructions() -> String {
    "baseline".into()
}
