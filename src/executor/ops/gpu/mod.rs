//! A GPU: its memory, kernels and matrix products.
//!
//! All work goes through one queue, including allocations and releases of memory.

#![allow(unsafe_code, reason = "cudarc launches kernels and products by address")]

mod halves;
mod kernels;

use std::{
    collections::BTreeMap,
    ops::{Deref, DerefMut},
    sync::{Arc, Mutex, PoisonError},
};

use cudarc::{
    cublas::{
        CudaBlas, Gemm, GemmConfig, StridedBatchedConfig,
        sys::{cublasMath_t, cublasOperation_t, cublasSetMathMode},
    },
    driver::{
        CudaDevice, CudaFunction, CudaSlice, DeviceRepr, DeviceSlice, LaunchAsync, LaunchConfig,
        sys,
    },
    nvrtc,
};
use dfdx::tensor::{Cuda, CudaError, Storage};

use self::halves::Halves;
pub(super) use self::halves::KERNELS as HALVES;
pub(super) use self::kernels::{Grid, Kernel, Kernels, Parameter, kernels};
pub(super) use super::place::Place;
use super::{KERNELS, gemm};
use crate::precision::Precision;

/// The result of an operation, or its error.
pub(super) type Result<T, E = CudaError> = std::result::Result<T, E>;

/// Values in a GPU's memory.
pub(super) type Slice<T = f32> = CudaSlice<T>;

const MODULE: &str = "barber";

/// The CUDA C++ source of all kernels, which is compiled when a GPU is opened.
pub fn source() -> String {
    kernels::source(KERNELS)
}

/// A GPU.
#[derive(Debug)]
pub(in crate::executor) struct Gpu {
    device: Arc<CudaDevice>,
    blas: CudaBlas,
    precision: Mutex<Precision>,
}

/// Numbers in a GPU's memory.
#[derive(Debug)]
pub struct Numbers {
    pub(super) slice: Slice,
    pub(super) gpu: Arc<Gpu>,
}

impl Deref for Numbers {
    type Target = Slice;

    fn deref(&self) -> &Slice {
        &self.slice
    }
}

impl DerefMut for Numbers {
    fn deref_mut(&mut self) -> &mut Slice {
        &mut self.slice
    }
}

/// The GPUs that were opened, by number.
static OPEN: Mutex<BTreeMap<usize, Arc<Gpu>>> = Mutex::new(BTreeMap::new());

impl Gpu {
    /// Opens the GPU with a number.
    pub(in crate::executor) fn open(number: usize) -> Result<Arc<Self>, String> {
        let mut open = OPEN.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(gpu) = open.get(&number) {
            return Ok(gpu.clone());
        }
        let device = CudaDevice::new(number).map_err(|e| e.to_string())?;
        keep_memory(&device).map_err(|e| e.to_string())?;
        let code = nvrtc::compile_ptx(source()).map_err(|e| e.to_string())?;
        let names: Vec<_> = kernels::names(KERNELS).collect();
        device.load_ptx(code, MODULE, &names).map_err(|e| e.to_string())?;
        let blas = CudaBlas::new(device.clone()).map_err(|e| e.to_string())?;
        let gpu = Arc::new(Self { device, blas, precision: Mutex::default() });
        open.insert(number, gpu.clone());
        Ok(gpu)
    }

    /// Sets the precision of products from here on.
    pub(in crate::executor) fn set_precision(&self, precision: Precision) -> Result<(), String> {
        *self.precision.lock().unwrap_or_else(PoisonError::into_inner) = precision;
        let mode = match precision {
            Precision::Tf32 => cublasMath_t::CUBLAS_TF32_TENSOR_OP_MATH,
            Precision::F32 | Precision::Bf16x3 => cublasMath_t::CUBLAS_DEFAULT_MATH,
        };
        // SAFETY: the handle is open as long as `blas` is.
        let set = unsafe { cublasSetMathMode(*self.blas.handle(), mode) }.result();
        set.map_err(|e| e.to_string())
    }

    fn precision(&self) -> Precision {
        *self.precision.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The GPU of a device of dfdx.
    pub(super) fn of(device: &Cuda) -> Result<Arc<Self>> {
        let nothing = Storage::<f32>::try_alloc_len(device, 0)?;
        Self::with(&nothing)
    }

    /// The GPU that has some numbers.
    pub(super) fn with(numbers: &Slice) -> Result<Arc<Self>> {
        Self::open(numbers.device().ordinal()).map_err(|_| CudaError::Driver(missing()))
    }

    /// Numbers from the host.
    pub(super) fn numbers(self: &Arc<Self>, values: &[f32]) -> Result<Numbers> {
        Ok(self.hold(self.upload(values)?))
    }

    pub(super) fn hold(self: &Arc<Self>, slice: Slice) -> Numbers {
        Numbers { slice, gpu: self.clone() }
    }

    /// Values from the host.
    pub(super) fn upload<T: DeviceRepr>(&self, values: &[T]) -> Result<Slice<T>> {
        Ok(self.device.htod_sync_copy(values)?)
    }

    /// Values on the host.
    pub(super) fn download<T: DeviceRepr>(&self, x: &Slice<T>) -> Result<Vec<T>> {
        Ok(self.device.dtoh_sync_copy(x)?)
    }

    /// Uninitialised memory for this count of numbers.
    pub(super) fn stale(self: &Arc<Self>, count: usize) -> Result<Numbers> {
        // SAFETY: every pattern of bits is a number, and whoever asks writes them all.
        Ok(self.hold(unsafe { self.device.alloc(count) }?))
    }

    pub(super) fn zeros(self: &Arc<Self>, count: usize) -> Result<Numbers> {
        Ok(self.hold(self.device.alloc_zeros(count)?))
    }

    pub(super) fn copy(self: &Arc<Self>, x: &Slice) -> Result<Numbers> {
        let mut copy = self.stale(x.len())?;
        self.device.dtod_copy(x, &mut copy.slice)?;
        Ok(copy)
    }

    /// Runs a kernel, if there are any blocks.
    ///
    /// # Safety
    /// The kernel must take these parameters, and its threads must stay within them.
    pub(super) unsafe fn launch<P>(&self, kernel: &str, grid: Grid, parameters: P) -> Result<()>
    where
        CudaFunction: LaunchAsync<P>,
    {
        let Grid { blocks, threads } = grid;
        if blocks.0 == 0 || blocks.1 == 0 {
            return Ok(());
        }
        let function = self.device.get_func(MODULE, kernel).ok_or_else(missing)?;
        let config = LaunchConfig {
            grid_dim: (blocks.0, blocks.1, 1),
            block_dim: (threads.0, threads.1, 1),
            shared_mem_bytes: 0,
        };
        // SAFETY: as of this function.
        unsafe { function.launch(config, parameters) }?;
        Ok(())
    }

    /// C = `scale` A B + `keep` C, for each of `count` triples: A of [rows, depth], B of
    /// [depth, columns], C of [rows, columns].
    pub(super) fn product(
        &self,
        (rows, columns, depth): (usize, usize, usize),
        (scale, keep): (f32, f32),
        a: Factor<'_>,
        b: Factor<'_>,
        (c, at): (&mut Slice, Place),
        count: usize,
    ) -> Result<()> {
        if [rows, columns, count].contains(&0) {
            return Ok(());
        }
        gemm::count(count * rows, columns, depth);
        let turned = |factor: &Factor<'_>, (rows, columns)| match factor.transposed {
            true => (columns, rows),
            false => (rows, columns),
        };
        assert!(a.place.fits(a.numbers.len(), turned(&a, (rows, depth)), count));
        assert!(b.place.fits(b.numbers.len(), turned(&b, (depth, columns)), count));
        assert!(at.fits(c.len(), (rows, columns), count));
        // The library's matrices are column by column: ours are their transposes, and
        // Cᵀ = Bᵀ Aᵀ.
        let shape = GemmConfig {
            transa: b.operation(),
            transb: a.operation(),
            m: columns as i32,
            n: rows as i32,
            k: depth as i32,
            alpha: scale,
            lda: b.place.stride as i32,
            ldb: a.place.stride as i32,
            beta: keep,
            ldc: at.stride as i32,
        };
        let config = StridedBatchedConfig {
            gemm: shape,
            batch_size: count as i32,
            stride_a: b.place.next as i64,
            stride_b: a.place.next as i64,
            stride_c: at.next as i64,
        };
        let mut c = c.slice_mut(at.start..);
        if self.precision() == Precision::Bf16x3 {
            let of_a = Halves::new(self, &a, turned(&a, (rows, depth)), count)?;
            let of_b = Halves::new(self, &b, turned(&b, (depth, columns)), count)?;
            // SAFETY: the places are within the numbers, as was checked, and begin where they were split.
            return unsafe { halves::product(self, &config, (&of_b, &of_a), &mut c) };
        }
        let (a, b) = (a.numbers.slice(a.place.start..), b.numbers.slice(b.place.start..));
        // SAFETY: the places are within the numbers, as was checked.
        unsafe {
            if count == 1 {
                self.blas.gemm(shape, &b, &a, &mut c)?;
            } else {
                self.blas.gemm_strided_batched(config, &b, &a, &mut c)?;
            }
        }
        Ok(())
    }
}

/// A factor of a product, or several.
#[derive(Clone, Copy)]
pub(super) struct Factor<'a> {
    numbers: &'a Slice,
    place: Place,
    transposed: bool,
}

impl<'a> Factor<'a> {
    pub(super) const fn new(numbers: &'a Slice, place: Place) -> Self {
        Self { numbers, place, transposed: false }
    }

    /// All of some rows of `width`.
    pub(super) const fn whole(numbers: &'a Slice, width: usize) -> Self {
        Self::new(numbers, Place::rows(width, 0))
    }

    /// The transpose of what lies there.
    pub(super) const fn transposed(self) -> Self {
        Self { transposed: !self.transposed, ..self }
    }

    const fn operation(&self) -> cublasOperation_t {
        match self.transposed {
            true => cublasOperation_t::CUBLAS_OP_T,
            false => cublasOperation_t::CUBLAS_OP_N,
        }
    }
}

/// The error of a missing kernel.
fn missing() -> cudarc::driver::DriverError {
    cudarc::driver::DriverError(sys::CUresult::CUDA_ERROR_NOT_FOUND)
}

/// Makes the driver keep released memory for reuse, instead of unmapping it at each wait for the
/// GPU.
fn keep_memory(device: &CudaDevice) -> Result<(), cudarc::driver::DriverError> {
    let pools = sys::CUdevice_attribute_enum::CU_DEVICE_ATTRIBUTE_MEMORY_POOLS_SUPPORTED;
    if device.attribute(pools)? == 0 {
        return Ok(());
    }
    let mut pool = std::ptr::null_mut();
    let mut most = u64::MAX;
    // SAFETY: the pool is the device's own, and the threshold is a number of 64 bits.
    unsafe {
        sys::cuDeviceGetDefaultMemPool(&raw mut pool, *device.cu_device()).result()?;
        let threshold = sys::CUmemPool_attribute_enum::CU_MEMPOOL_ATTR_RELEASE_THRESHOLD;
        sys::cuMemPoolSetAttribute(pool, threshold, (&raw mut most).cast()).result()
    }
}
