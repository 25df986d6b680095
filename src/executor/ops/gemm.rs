//! The matrix product of the CPU, over the `gemm` crate: with AVX-512 it runs at the machine's
//! peak, where dfdx's own product reaches half of it.

use std::{
    ops::{AddAssign, Range, Sub},
    sync::atomic::{AtomicU64, Ordering},
    time::Instant,
};

use gemm::Parallelism;
use rayon::prelude::*;
use serde::{Deserialize, Serialize};

use super::panels::Panels;
use crate::buffer::stale;

/// A matrix in a slice: element (i, j) is `data[i * row_stride + j * column_stride]`.
#[derive(Clone, Copy)]
pub(super) struct View<'a> {
    data: &'a [f32],
    rows: usize,
    columns: usize,
    row_stride: usize,
    column_stride: usize,
}

impl<'a> View<'a> {
    /// A contiguous row-major matrix.
    pub(super) fn new(data: &'a [f32], rows: usize, columns: usize) -> Self {
        Self::strided(data, rows, columns, columns)
    }

    /// A row-major matrix whose rows are `row_stride` elements apart.
    pub(super) fn strided(data: &'a [f32], rows: usize, columns: usize, row_stride: usize) -> Self {
        assert!(columns <= row_stride && fits(data.len(), rows, columns, row_stride));
        Self { data, rows, columns, row_stride, column_stride: 1 }
    }

    /// The transpose, of the same data.
    pub(super) fn t(self) -> Self {
        Self {
            rows: self.columns,
            columns: self.rows,
            row_stride: self.column_stride,
            column_stride: self.row_stride,
            ..self
        }
    }

    pub(super) fn columns(self) -> usize {
        self.columns
    }

    /// Some of its rows.
    pub(super) fn rows(self, rows: Range<usize>) -> Self {
        assert!(rows.start <= rows.end && rows.end <= self.rows);
        let first = if rows.is_empty() { 0 } else { rows.start * self.row_stride };
        Self { data: &self.data[first..], rows: rows.len(), ..self }
    }
}

fn fits(len: usize, rows: usize, columns: usize, row_stride: usize) -> bool {
    rows == 0 || columns == 0 || (rows - 1) * row_stride + columns <= len
}

static OPERATIONS: AtomicU64 = AtomicU64::new(0);
static NANOSECONDS: AtomicU64 = AtomicU64::new(0);

/// The work of matrix products.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Products {
    /// Floating-point operations of the products.
    pub operations: u64,
    /// Mean seconds per thread spent on the products; 0 on a GPU, which does not tell.
    pub seconds: f64,
}

impl Products {
    /// The work of all products so far.
    pub fn so_far() -> Self {
        let [operations, nanoseconds] =
            [&OPERATIONS, &NANOSECONDS].map(|count| count.load(Ordering::Relaxed));
        let seconds = nanoseconds as f64 / 1e9 / rayon::current_num_threads() as f64;
        Self { operations, seconds }
    }
}

impl Sub for Products {
    type Output = Self;

    fn sub(self, other: Self) -> Self {
        Self {
            operations: self.operations - other.operations,
            seconds: self.seconds - other.seconds,
        }
    }
}

impl AddAssign for Products {
    fn add_assign(&mut self, other: Self) {
        self.operations += other.operations;
        self.seconds += other.seconds;
    }
}

/// Counts the operations of a product of [rows, depth] and [depth, columns].
pub(super) fn count(rows: usize, columns: usize, depth: usize) {
    OPERATIONS.fetch_add(2 * (rows * columns * depth) as u64, Ordering::Relaxed);
}

/// out = beta · out + alpha · a b, with `out` row-major, its rows `row_stride` elements apart; on
/// the calling thread.
pub(super) fn gemm(
    out: &mut [f32],
    row_stride: usize,
    beta: f32,
    alpha: f32,
    a: View<'_>,
    b: View<'_>,
) {
    assert_eq!(a.columns, b.rows);
    assert!(b.columns <= row_stride && fits(out.len(), a.rows, b.columns, row_stride));
    if a.rows == 0 || b.columns == 0 {
        return;
    }
    count(a.rows, b.columns, a.columns);
    let started = Instant::now();
    #[allow(unsafe_code, reason = "the gemm crate's interface is raw pointers")]
    // SAFETY: each view holds its last element (checked when it was made, and above for `out`),
    // and `out` is borrowed mutably, so it overlaps neither.
    unsafe {
        gemm::gemm(
            a.rows,
            b.columns,
            a.columns,
            out.as_mut_ptr(),
            1,
            row_stride as isize,
            beta != 0.0,
            a.data.as_ptr(),
            a.column_stride as isize,
            a.row_stride as isize,
            b.data.as_ptr(),
            b.column_stride as isize,
            b.row_stride as isize,
            beta,
            alpha,
            false,
            false,
            false,
            Parallelism::None,
        );
    }
    let nanoseconds = started.elapsed().as_nanos() as u64;
    NANOSECONDS.fetch_add(nanoseconds, Ordering::Relaxed);
}

/// Maximum number of rows of a product that one task computes.
pub(super) const TASK_ROWS: usize = 256;

/// Number of rows of a product that one task computes. It depends on the shape alone, as the result
/// must not depend on the number of threads.
pub(super) fn task_rows(rows: usize) -> usize {
    match rows {
        1024.. => TASK_ROWS,
        _ => rows.div_ceil(4).next_multiple_of(16),
    }
}

/// a b, row-major, plus `bias` in every row; on all threads. Each thread computes its own rows,
/// which is faster than sharing one product.
pub(super) fn product(a: View<'_>, b: &Panels, bias: Option<&[f32]>) -> Vec<f32> {
    let mut out = stale(a.rows * b.columns());
    if let Some(bias) = bias {
        out.par_chunks_exact_mut(b.columns().max(1)).for_each(|row| row.copy_from_slice(bias));
    }
    add_product(&mut out, if bias.is_some() { 1.0 } else { 0.0 }, a, b);
    out
}

/// out = beta · out + a b, row-major; on all threads.
pub(super) fn add_product(out: &mut [f32], beta: f32, a: View<'_>, b: &Panels) {
    let (columns, rows) = (b.columns(), task_rows(a.rows));
    // A task for each block of rows: a thread that is held up must not keep two of them.
    let tasks = out.par_chunks_mut((rows * columns).max(1)).with_max_len(1);
    tasks.enumerate().for_each(|(i, out)| {
        let a = a.rows(i * rows..a.rows.min((i + 1) * rows));
        for (first, panel) in b.iter() {
            gemm(&mut out[first..], columns, beta, 1.0, a, panel);
        }
    });
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::executor::ops::Factor;

    #[test]
    fn products_of_strided_and_transposed_views() {
        let a = [1.0, 2.0, 9.0, 3.0, 4.0, 9.0]; // [[1, 2], [3, 4]] with stride 3
        let b = [5.0, 6.0, 7.0, 8.0]; // [[5, 6], [7, 8]]
        let a = View::strided(&a, 2, 2, 3);
        let mut out = [1.0; 4];
        gemm(&mut out, 2, 0.0, 1.0, a, View::new(&b, 2, 2));
        assert_eq!(out, [19.0, 22.0, 43.0, 50.0]);
        gemm(&mut out, 2, 1.0, 2.0, a, View::new(&b, 2, 2).t());
        assert_eq!(out, [19.0 + 34.0, 22.0 + 46.0, 43.0 + 78.0, 50.0 + 106.0]);
        gemm(&mut out[2..], 2, 0.0, 1.0, a.rows(1..2), View::new(&b, 2, 2));
        assert_eq!(out[2..], [43.0, 50.0]);
    }

    #[test]
    fn tasks_join_without_a_seam() {
        for rows in [0, 1, 5, 100, 1030] {
            let a: Vec<f32> = (0..rows * 2).map(|i| i as f32).collect();
            let factor = Factor::new(&[1.0, 2.0], (1, 2));
            let found = product(View::new(&a, rows, 2), factor.forward(), Some(&[0.5]));
            let expected: Vec<f32> = a.chunks(2).map(|a| a[0] + 2.0 * a[1] + 0.5).collect();
            assert_eq!(found, expected);
        }
    }

    #[test]
    #[should_panic(expected = "assertion")]
    fn a_view_beyond_its_data_is_refused() {
        View::new(&[0.0; 5], 2, 3);
    }
}
