//! Which device runs a model, and how much memory it may take.

use std::{borrow::Cow, fmt, str::FromStr};

use schemars::{JsonSchema, Schema, SchemaGenerator, json_schema};
use serde::{Deserialize, Serialize};
use sysinfo::System;

/// A device, as a recipe names it.
///
/// ```
/// use llm_barber::executor::Device;
///
/// assert_eq!("cuda:1".parse(), Ok(Device::Cuda(1)));
/// assert_eq!(Device::Cpu.to_string(), "cpu");
/// assert_eq!(
///     "gpu".parse::<Device>().unwrap_err(),
///     "`gpu` is no device: expected `cpu`, or `cuda:0` for the first NVIDIA GPU",
/// );
/// ```
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub enum Device {
    /// The processor.
    #[default]
    Cpu,
    /// The NVIDIA GPU with this number.
    Cuda(usize),
}

impl FromStr for Device {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let number = || text.strip_prefix("cuda:")?.parse().ok();
        match (text, number()) {
            ("cpu", _) => Ok(Self::Cpu),
            (_, Some(number)) => Ok(Self::Cuda(number)),
            _ => Err(format!(
                "`{text}` is no device: expected `cpu`, or `cuda:0` for the first NVIDIA GPU"
            )),
        }
    }
}

impl JsonSchema for Device {
    fn schema_name() -> Cow<'static, str> {
        "Device".into()
    }

    fn json_schema(_: &mut SchemaGenerator) -> Schema {
        json_schema!({
            "type": "string",
            "anyOf": [{ "enum": ["cpu", "cuda:0"] }, { "pattern": "^cuda:[0-9]+$" }]
        })
    }
}

impl TryFrom<String> for Device {
    type Error = String;

    fn try_from(text: String) -> Result<Self, String> {
        text.parse()
    }
}

impl From<Device> for String {
    fn from(device: Device) -> Self {
        device.to_string()
    }
}

impl fmt::Display for Device {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Cpu => f.write_str("cpu"),
            Self::Cuda(number) => write!(f, "cuda:{number}"),
        }
    }
}

/// Opens an NVIDIA GPU; with the bytes of memory that it has free.
///
/// # Errors
/// What is missing.
#[cfg(feature = "cuda")]
pub fn cuda(number: usize) -> Result<(dfdx::tensor::Cuda, u64), String> {
    let open = || {
        // Without a driver, or a GPU of this number, the binding's own calls would panic.
        cudarc::driver::result::init().map_err(|e| format!("{e:?}"))?;
        let count = cudarc::driver::result::device::get_count().map_err(|e| format!("{e:?}"))?;
        if i32::try_from(number).map_or(true, |number| number >= count) {
            return Err(format!("the driver knows {count} GPUs, and counts from 0"));
        }
        super::ops::gpu::Gpu::open(number)?;
        let device = dfdx::tensor::Cuda::try_build(number, 0).map_err(|e| e.to_string())?;
        let (free, _) = cudarc::driver::result::mem_get_info().map_err(|e| format!("{e:?}"))?;
        Ok((device, free as u64 / 10 * 9))
    };
    open().map_err(|why: String| {
        format!("cuda:{number} cannot be opened: {why}. `nvidia-smi` lists the GPUs that there are")
    })
}

/// The memory that is taken to be free where the system does not say: in a sandbox without /proc.
const ASSUMED: u64 = 8 << 30;

/// The memory that a run may take where the recipe does not say: most of what the machine has free,
/// or of what the control group allows.
pub fn available_memory() -> u64 {
    let mut system = System::new();
    system.refresh_memory();
    most_of(&system)
}

fn most_of(system: &System) -> u64 {
    if system.total_memory() == 0 {
        return ASSUMED;
    }
    let free = system.cgroup_limits().map_or(u64::MAX, |limits| limits.free_memory);
    system.available_memory().min(free) / 10 * 9
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn devices_are_read_as_they_are_written() {
        for device in [Device::Cpu, Device::Cuda(0), Device::Cuda(12)] {
            assert_eq!(device.to_string().parse(), Ok(device));
        }
        for wrong in ["", "CPU", "cuda", "cuda:", "cuda:-1", "cuda:x"] {
            assert!(wrong.parse::<Device>().is_err(), "{wrong}");
        }
    }

    #[test]
    fn there_is_memory() {
        assert!(available_memory() > 1 << 20);
    }

    #[test]
    fn a_system_that_says_nothing_has_some_memory() {
        assert_eq!(most_of(&System::new()), ASSUMED);
    }
}
