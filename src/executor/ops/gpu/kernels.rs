//! CUDA kernels with typed arguments: a kernel's list of parameters is written once, in Rust. The
//! function that launches it takes them, and its prototype in CUDA C++ is made of them.

use cudarc::driver::DeviceRepr;

use super::Slice;

/// Threads of a block; the sums of a block count on their number.
const THREADS: u32 = 256;

/// The numbers of blocks and of threads that a kernel runs in.
#[derive(Clone, Copy)]
pub(in crate::executor::ops) struct Grid {
    pub(in crate::executor::ops) blocks: (u32, u32),
    pub(in crate::executor::ops) threads: (u32, u32),
}

impl Grid {
    /// A thread for each of `count` elements.
    pub(in crate::executor::ops) const fn each(count: usize) -> Self {
        Self { blocks: (count.div_ceil(THREADS as usize) as u32, 1), threads: (THREADS, 1) }
    }

    /// A block for each of `rows`, of `others` matrices.
    pub(in crate::executor::ops) const fn rows(rows: usize, others: usize) -> Self {
        Self { blocks: (rows as u32, others as u32), threads: (THREADS, 1) }
    }
}

/// The kernels of an operation.
pub(in crate::executor::ops) struct Kernels {
    /// The functions that they share.
    pub(in crate::executor::ops) functions: &'static str,
    pub(in crate::executor::ops) kernels: &'static [Kernel],
}

/// A kernel.
pub(in crate::executor::ops) struct Kernel {
    pub(in crate::executor::ops) name: &'static str,
    /// The type and the name of each parameter.
    pub(in crate::executor::ops) parameters: &'static [(&'static str, &'static str)],
    pub(in crate::executor::ops) body: &'static str,
}

/// A type that a kernel takes as a parameter.
pub(in crate::executor::ops) trait Parameter: DeviceRepr {
    /// The same type in CUDA C++.
    const TYPE: &'static str;
}

macro_rules! parameters {
    ($($type:ty: $name:literal),* $(,)?) => {
        $(impl Parameter for $type {
            const TYPE: &'static str = $name;
        })*
    };
}

parameters! {
    usize: "index_t ",
    i32: "int ",
    f32: "float ",
    &Slice: "const float *",
    &mut Slice: "float *",
    &mut Slice<u16>: "unsigned short *",
    &Slice<u32>: "const unsigned *",
    &Slice<u64>: "const index_t *",
    &mut Slice<u64>: "index_t *",
}

/// Declares an operation's kernels, [`KERNELS`](Kernels): `functions` that they share, then each
/// kernel as a function of Rust with a body of CUDA C++. It becomes a function that takes the GPU,
/// the grid and the kernel's parameters, and launches it.
macro_rules! kernels {
    (
        $(functions $functions:literal;)?
        $($(#[$doc:meta])* fn $name:ident($($parameter:ident: $type:ty),+ $(,)?) $body:literal)+
    ) => {
        pub(in crate::executor::ops) const KERNELS: $crate::executor::ops::gpu::Kernels =
            $crate::executor::ops::gpu::Kernels {
                functions: concat!($($functions)?),
                kernels: &[$($crate::executor::ops::gpu::Kernel {
                    name: stringify!($name),
                    parameters: &[$((
                        <$type as $crate::executor::ops::gpu::Parameter>::TYPE,
                        stringify!($parameter),
                    )),+],
                    body: $body,
                }),+],
            };

        $(
            $(#[$doc])*
            #[allow(clippy::too_many_arguments, reason = "as many as the kernel has")]
            fn $name(
                gpu: &$crate::executor::ops::gpu::Gpu,
                grid: $crate::executor::ops::gpu::Grid,
                $($parameter: $type),+
            ) -> $crate::executor::ops::gpu::Result<()> {
                #[allow(unsafe_code, reason = "the kernel is other code")]
                // SAFETY: the kernel's prototype is made of this list of parameters; the operation,
                // which alone sees this function, has room for what the threads read and write.
                unsafe { gpu.launch(stringify!($name), grid, ($($parameter,)+)) }
            }
        )+
    };
}
pub(in crate::executor::ops) use kernels;

/// The names of all kernels.
pub(super) fn names(all: &'static [Kernels]) -> impl Iterator<Item = &'static str> {
    all.iter().flat_map(|kernels| kernels.kernels).map(|kernel| kernel.name)
}

/// The source of all kernels.
pub(super) fn source(all: &[Kernels]) -> String {
    let mut source = include_str!("common.cu").to_owned();
    all.iter().for_each(|kernels| source += kernels.functions);
    for Kernel { name, parameters, body } in all.iter().flat_map(|kernels| kernels.kernels) {
        let parameters: Vec<_> =
            parameters.iter().map(|(of, name)| format!("{of}{name}")).collect();
        let parameters = parameters.join(", ");
        source += &format!("\nextern \"C\" __global__ void {name}({parameters}) {{{body}}}\n");
    }
    source
}
