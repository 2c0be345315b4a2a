//! The decoder's own operations against f64, on every device: the CPU in f32, GPUs in f32, f16 and bf16.
//!
//! Tolerances are those of the arithmetic the trait promises, sums and statistics in f32, with
//! u = 2^-24 the rounding of an f32 and `T`'s rounding of the result.

#[path = "../testing/devices.rs"]
mod devices;

use devices::devices;
use half::{bf16, f16};
use quantkv::decoder::Compute;
use quantkv::decoder::compute::RandomMatrix;
use quantkv::decoder::random;
use quantkv::{Backend, DType, Element};

const U: f64 = 1.0 / (1u64 << 24) as f64;

/// Relative rounding of a type.
fn unit<T: Element>() -> f64 {
    match T::DTYPE {
        DType::F32 => U,
        DType::F16 => 1.0 / 2048.0,
        DType::BF16 => 1.0 / 256.0,
    }
}

/// Smallest step of a type near zero.
fn tiny<T: Element>() -> f64 {
    if T::DTYPE == DType::F16 { 2f64.powi(-25) } else { 1e-38 }
}

/// Checks with f32 on every device, and with 16-bit activations on GPUs.
macro_rules! on_every_device {
    ($check:ident) => {
        for device in devices() {
            let name = device.to_string();
            match &device {
                devices::Device::Cpu(cpu) => $check::<_, f32>(&**cpu, &name),
                #[cfg(feature = "rocm")]
                devices::Device::Rocm(rocm) => {
                    for (rocm, products) in rocm_with_both_products(rocm) {
                        $check::<_, f32>(&rocm, &format!("{name}, {products}, f32"));
                        $check::<_, f16>(&rocm, &format!("{name}, {products}, f16"));
                        $check::<_, bf16>(&rocm, &format!("{name}, {products}, bf16"));
                    }
                }
                #[cfg(feature = "cuda")]
                devices::Device::Cuda(cuda) => {
                    for cuda in with_both_products(cuda) {
                        $check::<_, f32>(&cuda, &format!("{name}, f32"));
                        $check::<_, f16>(&cuda, &format!("{name}, f16"));
                        $check::<_, bf16>(&cuda, &format!("{name}, bf16"));
                    }
                }
            }
        }
    };
}

/// Our own products, and cuBLASLt's where it is installed.
#[cfg(feature = "cuda")]
fn with_both_products(cuda: &quantkv::cuda::CudaBackend) -> Vec<quantkv::cuda::CudaBackend> {
    use quantkv::decoder::cuda::{DecoderOptions, Products};
    let with = |products| cuda.with_decoder_options(DecoderOptions { products, ..Default::default() });
    let mut backends = vec![with(Products::Portable)];
    let library = with(Products::CublasLt);
    match library.uses_cublaslt() {
        Ok(_) => backends.push(library),
        Err(reason) => println!("skipped: {reason}"),
    }
    backends
}

/// Our own products, and rocBLAS's where it is installed (`QUANTKV_REQUIRE_ROCBLAS=1`: it must be).
#[cfg(feature = "rocm")]
fn rocm_with_both_products(rocm: &quantkv::rocm::RocmBackend) -> Vec<(quantkv::rocm::RocmBackend, &'static str)> {
    use quantkv::decoder::rocm::{DecoderOptions, Products};
    let with = |products| rocm.with_decoder_options(DecoderOptions { products });
    let mut backends = vec![(with(Products::Portable), "our own products")];
    let library = with(Products::RocBlas);
    match library.uses_rocblas() {
        Ok(_) => backends.push((library, "rocBLAS")),
        Err(reason) if std::env::var_os("QUANTKV_REQUIRE_ROCBLAS").is_some_and(|value| value == "1") => {
            panic!("QUANTKV_REQUIRE_ROCBLAS is set, but: {reason}")
        }
        Err(reason) => println!("skipped: {reason}"),
    }
    backends
}

fn uploaded<B: Backend, T: quantkv::format::Pod>(backend: &B, values: &[T]) -> B::Buffer<T> {
    let mut buffer = backend.zeros("test data", values.len()).unwrap();
    backend.upload(values, &mut buffer).unwrap();
    buffer
}

fn downloaded<B: Backend, T: quantkv::format::Pod>(backend: &B, buffer: &B::Buffer<T>, len: usize) -> Vec<T> {
    let mut values = vec![T::default(); len];
    backend.download(buffer, &mut values).unwrap();
    values
}

/// Numbers of deviation 1 in `T`.
fn numbers<T: Element>(seed: u64, len: usize) -> Vec<T> {
    let mut values = vec![T::default(); len];
    random::fill(seed, 1.0, &mut values);
    values
}

fn wide<T: Element>(values: &[T]) -> Vec<f64> {
    values.iter().map(|x| f64::from(x.to_f32())).collect()
}

/// A random matrix on the backend, and its elements.
fn matrix<B: Compute<A>, A: Element>(backend: &B, rows: usize, cols: usize, dtype: DType) -> (B::Matrix, Vec<f64>) {
    let seed = (rows * 1000 + cols) as u64;
    let made = backend.random_matrix(&RandomMatrix { rows, cols, dtype, seed, deviation: 0.3 }).unwrap();
    let mut values = vec![0.0f32; rows * cols];
    random::fill(seed, 0.3, &mut values);
    let round = |x: f32| match dtype {
        DType::F32 => x,
        DType::F16 => f16::from_f32(x).to_f32(),
        DType::BF16 => bf16::from_f32(x).to_f32(),
    };
    (made, values.into_iter().map(|x| f64::from(round(x))).collect())
}

fn assert_near(got: f64, want: f64, tolerance: f64, case: &str) {
    assert!((got - want).abs() <= tolerance, "{case}: {got}, expected {want} to {tolerance:e}");
}

#[test]
fn rows_are_selected_exactly() {
    on_every_device!(check);
    fn check<B: Compute<A>, A: Element>(backend: &B, case: &str) {
        for width in [1, 7, 8, 46, 1032] {
            let ids = [3, 0, 2, 2, 4];
            let device_ids = uploaded(backend, &ids);
            for dtype in [DType::F32, DType::F16, DType::BF16] {
                let (table, values) = matrix::<B, A>(backend, 5, width, dtype);
                let mut out = backend.zeros::<A>("out", 5 * width).unwrap();
                backend.embed(&table, &device_ids, 5, &mut out).unwrap();
                let got = downloaded(backend, &out, 5 * width);
                for (row, id) in ids.iter().enumerate() {
                    for i in 0..width {
                        let want = A::from_f32(values[*id as usize * width + i] as f32).to_f32();
                        assert_eq!(
                            got[row * width + i].to_f32(),
                            want,
                            "{case}: {dtype} row {row}, channel {i} of {width}"
                        );
                    }
                }
            }
            let x = numbers::<A>(1, 5 * width);
            let mut out = backend.zeros::<A>("out", 5 * width).unwrap();
            backend.gather_rows(&uploaded(backend, &x), &device_ids, 5, width, &mut out).unwrap();
            let want: Vec<A> = ids.iter().flat_map(|id| x[*id as usize * width..][..width].to_vec()).collect();
            assert!(downloaded(backend, &out, 5 * width) == want, "{case}: gathered rows of {width}");
        }
    }
}

#[test]
fn rms_norm_in_both_forms() {
    on_every_device!(check);
    fn check<B: Compute<A>, A: Element>(backend: &B, case: &str) {
        for (rows, width) in [(1, 1), (9, 46), (3, 64), (2, 512), (2, 520), (3, 2056), (1, 1031)] {
            let (x, weight) = (numbers::<A>(2, rows * width), numbers::<A>(3, width));
            let mut device_x = uploaded(backend, &x);
            let device_weight = uploaded(backend, &weight);
            let eps = 1e-5;
            let check = |got: &[A], first: usize| {
                let (x, weight) = (wide(&x), wide(&weight));
                for (i, got) in got.iter().enumerate() {
                    let (row, channel) = (first + i / width, i % width);
                    let values = &x[row * width..][..width];
                    let mean = values.iter().map(|x| x * x).sum::<f64>() / width as f64;
                    let want = weight[channel] * (x[row * width + channel] / (mean + f64::from(eps as f32)).sqrt());
                    // The sum of squares, halved by the root; the root, three products.
                    let relative = (width as f64 / 2.0 + 10.0) * U + unit::<A>();
                    let tolerance = relative * want.abs() + tiny::<A>();
                    assert_near(got.to_f32().into(), want, tolerance, &format!("{case}: {rows} x {width} at {i}"));
                }
            };
            let mut out = backend.zeros::<A>("out", rows * width).unwrap();
            backend.rms_norm(&device_x, 0, rows, &device_weight, eps as f32, &mut out).unwrap();
            check(&downloaded(backend, &out, rows * width), 0);
            backend.rms_norm(&device_x, rows - 1, 1, &device_weight, eps as f32, &mut out).unwrap();
            check(&downloaded(backend, &out, width), rows - 1);
            backend.rms_norm_in_place(&mut device_x, rows, &device_weight, eps as f32).unwrap();
            check(&downloaded(backend, &device_x, rows * width), 0);
        }
    }
}

#[test]
fn linear_layers_and_logits() {
    on_every_device!(check);
    fn check<B: Compute<A>, A: Element>(backend: &B, case: &str) {
        for (rows, inputs, outputs) in
            [(1, 8, 1), (2, 7, 3), (8, 40, 9), (9, 264, 5), (17, 46, 8), (3, 1040, 4), (300, 5, 2)]
        {
            let (x, bias) = (numbers::<A>(4, rows * inputs), numbers::<A>(5, outputs));
            let (device_x, device_bias) = (uploaded(backend, &x), uploaded(backend, &bias));
            for dtype in [DType::F32, DType::F16, DType::BF16] {
                let (weight, values) = matrix::<B, A>(backend, outputs, inputs, dtype);
                let (x, bias) = (wide(&x), wide(&bias));
                let check = |got: f64, at: usize, bias: f64, rounding: f64, form: &str| {
                    let (row, o) = (at / outputs, at % outputs);
                    let products = || (0..inputs).map(|i| x[row * inputs + i] * values[o * inputs + i]);
                    let (sum, magnitude) = (products().sum::<f64>() + bias, products().map(f64::abs).sum::<f64>());
                    let tolerance =
                        (inputs as f64 + 2.0) * U * (magnitude + bias.abs()) + rounding * sum.abs() + tiny::<A>();
                    let case = format!("{case}: {form} of {rows} x {inputs} x {outputs}, {dtype}, at {at}");
                    assert_near(got, sum, tolerance, &case);
                };
                let mut out = backend.zeros::<A>("out", rows * outputs).unwrap();
                backend.linear(&device_x, rows, &weight, Some(&device_bias), &mut out).unwrap();
                for (at, got) in downloaded(backend, &out, rows * outputs).iter().enumerate() {
                    check(got.to_f32().into(), at, bias[at % outputs], unit::<A>(), "linear with bias");
                }
                backend.linear(&device_x, rows, &weight, None, &mut out).unwrap();
                for (at, got) in downloaded(backend, &out, rows * outputs).iter().enumerate() {
                    check(got.to_f32().into(), at, 0.0, unit::<A>(), "linear");
                }
                let mut logits = backend.zeros::<f32>("logits", rows * outputs).unwrap();
                backend.logits(&device_x, rows, &weight, &mut logits).unwrap();
                for (at, got) in downloaded(backend, &logits, rows * outputs).iter().enumerate() {
                    check((*got).into(), at, 0.0, U, "logits");
                }
            }
        }
    }
}

/// The promise of the trait; cuBLASLt and rocBLAS make no such promise.
#[test]
fn a_row_of_a_product_is_the_same_bits_in_every_batch() {
    for device in devices() {
        match &device {
            devices::Device::Cpu(cpu) => check::<_, f32>(&**cpu),
            #[cfg(feature = "rocm")]
            devices::Device::Rocm(rocm) => {
                let (own, _) = &rocm_with_both_products(rocm)[0];
                check::<_, f32>(own);
                check::<_, bf16>(own);
            }
            #[cfg(feature = "cuda")]
            devices::Device::Cuda(cuda) => {
                let own = &with_both_products(cuda)[0];
                check::<_, f32>(own);
                check::<_, bf16>(own);
            }
        }
    }
    fn check<B: Compute<A>, A: Element>(backend: &B) {
        for inputs in [264, 46] {
            let (rows, outputs) = (19, 6);
            let x = numbers::<A>(6, rows * inputs);
            let (weight, _) = matrix::<B, A>(backend, outputs, inputs, DType::BF16);
            let mut out = backend.zeros::<f32>("logits", rows * outputs).unwrap();
            backend.logits(&uploaded(backend, &x), rows, &weight, &mut out).unwrap();
            let all = downloaded(backend, &out, rows * outputs);
            for row in 0..rows {
                let alone = uploaded(backend, &x[row * inputs..][..inputs]);
                backend.logits(&alone, 1, &weight, &mut out).unwrap();
                let alone = downloaded(backend, &out, outputs);
                let bits = |values: &[f32]| values.iter().map(|x| x.to_bits()).collect::<Vec<_>>();
                assert_eq!(bits(&alone), bits(&all[row * outputs..][..outputs]), "row {row} of {inputs} inputs");
            }
        }
    }
}

#[test]
fn rotary_tables_and_their_use() {
    on_every_device!(check);
    fn check<B: Compute<A>, A: Element>(backend: &B, case: &str) {
        let positions = [0, 1, 2, 17, 4095, 8191, 131_071, 1 << 20];
        for (head_dim, heads) in [(2, 3), (46, 2), (64, 1), (128, 2)] {
            let half = head_dim / 2;
            let inv_freq: Vec<f32> = (0..half).map(|i| 500_000f32.powf(-(i as f32) / half as f32)).collect();
            let rows = positions.len();
            let (mut cos, mut sin) =
                (backend.zeros("cos", rows * half).unwrap(), backend.zeros("sin", rows * half).unwrap());
            let (positions_on, freq_on) = (uploaded(backend, &positions), uploaded(backend, &inv_freq));
            backend.rope_table(&positions_on, rows, &freq_on, 1.25, &mut cos, &mut sin).unwrap();
            let (cos_host, sin_host) = (downloaded(backend, &cos, rows * half), downloaded(backend, &sin, rows * half));
            for (row, position) in positions.iter().enumerate() {
                for (i, freq) in inv_freq.iter().enumerate() {
                    let angle = f64::from(*position as f32 * freq);
                    let at = row * half + i;
                    // An ulp of the function, half of one of the product.
                    assert_near(cos_host[at].into(), 1.25 * angle.cos(), 3.0 * U, &format!("{case}: cos {angle}"));
                    assert_near(sin_host[at].into(), 1.25 * angle.sin(), 3.0 * U, &format!("{case}: sin {angle}"));
                }
            }
            let x = numbers::<A>(7, rows * heads * head_dim);
            let mut turned = uploaded(backend, &x);
            backend.rope(&mut turned, rows, heads, head_dim, &cos, &sin).unwrap();
            let (got, x) = (wide(&downloaded(backend, &turned, x.len())), wide(&x));
            for (at, got) in got.iter().enumerate() {
                let (head, i) = (at / head_dim, at % head_dim);
                let angle = head / heads * half + i % half;
                let (c, s) = (f64::from(cos_host[angle]), f64::from(sin_host[angle]));
                let (a, b) = (x[head * head_dim + i % half], x[head * head_dim + half + i % half]);
                let (want, size) = match i < half {
                    true => (a * c - b * s, (a * c).abs() + (b * s).abs()),
                    false => (b * c + a * s, (b * c).abs() + (a * s).abs()),
                };
                let tolerance = 3.0 * U * size + unit::<A>() * want.abs() + tiny::<A>();
                assert_near(*got, want, tolerance, &format!("{case}: rope of {heads} x {head_dim} at {at}"));
            }
        }
    }
}

#[test]
fn gates_and_residuals() {
    on_every_device!(check);
    fn check<B: Compute<A>, A: Element>(backend: &B, case: &str) {
        for len in [1, 7, 8, 256, 2500] {
            let mut gate = numbers::<A>(8, len);
            for (i, x) in gate.iter_mut().enumerate() {
                // From where the gate is shut to where it is open.
                *x = A::from_f32(x.to_f32() * [1.0, 8.0, 25.0][i % 3]);
            }
            let up = numbers::<A>(9, len);
            let mut device = uploaded(backend, &gate);
            backend.silu_mul(&mut device, &uploaded(backend, &up), len).unwrap();
            let (got, gate, up) = (wide(&downloaded(backend, &device, len)), wide(&gate), wide(&up));
            for i in 0..len {
                let want = gate[i] / (1.0 + (-gate[i]).exp()) * up[i];
                let tolerance = (16.0 * U + unit::<A>()) * want.abs() + tiny::<A>();
                assert_near(got[i], want, tolerance, &format!("{case}: silu({}) * {} of {len}", gate[i], up[i]));
            }
            for first in [0, 3, 8] {
                let (x, y) = (numbers::<A>(10, len + 8), numbers::<A>(11, len));
                let mut device = uploaded(backend, &x);
                backend.add(&mut device, first, &uploaded(backend, &y), len).unwrap();
                for (i, got) in downloaded(backend, &device, x.len()).iter().enumerate() {
                    let added = i.checked_sub(first).and_then(|i| y.get(i));
                    let want = added.map_or(x[i], |y| A::from_f32(x[i].to_f32() + y.to_f32()));
                    assert!(*got == want, "{case}: element {i} of {len} after adding at {first}");
                }
            }
        }
    }
}

#[test]
fn greedy_takes_the_lowest_of_the_largest() {
    on_every_device!(check);
    fn check<B: Compute<A>, A: Element>(backend: &B, case: &str) {
        for vocab in [1, 5, 512, 2051, 4096] {
            let mut rows: Vec<Vec<f32>> = (0..4).map(|seed| numbers::<f32>(20 + seed, vocab)).collect();
            rows.push(vec![1.5; vocab]);
            rows.push(vec![f32::NAN; vocab]);
            rows.push(vec![f32::NEG_INFINITY; vocab]);
            let mut peaks = vec![f32::NAN; vocab];
            for at in [vocab / 3, vocab / 2, vocab - 1] {
                peaks[at] = f32::INFINITY;
            }
            rows.push(peaks);
            let mut zeros = vec![-1.0; vocab];
            (zeros[vocab / 2], zeros[vocab - 1]) = (-0.0, 0.0);
            rows.push(zeros);
            let naive = |row: &Vec<f32>| {
                let largest = row.iter().copied().filter(|x| !x.is_nan()).fold(f32::NEG_INFINITY, f32::max);
                let found = row.iter().position(|x| *x == largest && largest > f32::NEG_INFINITY);
                found.map_or(-1, |at| at as i32)
            };
            let want: Vec<i32> = rows.iter().map(naive).collect();
            let mut tokens = backend.zeros::<i32>("tokens", rows.len()).unwrap();
            backend.greedy(&uploaded(backend, &rows.concat()), rows.len(), vocab, &mut tokens).unwrap();
            assert_eq!(downloaded(backend, &tokens, rows.len()), want, "{case}: a vocabulary of {vocab}");
        }
    }
}

/// Buffers too short are refused before anything runs.
#[test]
fn short_buffers_are_refused() {
    on_every_device!(check);
    fn check<B: Compute<A>, A: Element>(backend: &B, case: &str) {
        let refused = |result: quantkv::Result<()>, what: &str| match result {
            Err(quantkv::Error::BufferTooSmall { .. }) => {}
            other => panic!("{case}: {what}: {other:?}"),
        };
        let (table, _) = matrix::<B, A>(backend, 4, 8, DType::F32);
        let ids = uploaded(backend, &[0, 1]);
        let buffer = |len: usize| backend.zeros::<A>("short", len).unwrap();
        let floats = |len: usize| backend.zeros::<f32>("short", len).unwrap();
        refused(backend.embed(&table, &ids, 2, &mut buffer(15)), "embed");
        refused(backend.embed(&table, &ids, 3, &mut buffer(24)), "embed ids");
        refused(backend.rms_norm(&buffer(16), 1, 2, &buffer(8), 1e-5, &mut buffer(16)), "rms_norm");
        refused(backend.rms_norm_in_place(&mut buffer(15), 2, &buffer(8), 1e-5), "rms_norm_in_place");
        refused(backend.linear(&buffer(15), 2, &table, None, &mut buffer(8)), "linear input");
        refused(backend.linear(&buffer(16), 2, &table, None, &mut buffer(7)), "linear output");
        refused(backend.linear(&buffer(16), 2, &table, Some(&buffer(3)), &mut buffer(8)), "linear bias");
        refused(backend.logits(&buffer(16), 2, &table, &mut floats(7)), "logits");
        refused(backend.rope(&mut buffer(15), 2, 1, 8, &floats(8), &floats(8)), "rope");
        refused(backend.rope(&mut buffer(16), 2, 1, 8, &floats(7), &floats(8)), "rope table");
        refused(backend.silu_mul(&mut buffer(4), &buffer(3), 4), "silu_mul");
        refused(backend.add(&mut buffer(4), 1, &buffer(4), 4), "add");
        refused(backend.gather_rows(&buffer(16), &ids, 2, 8, &mut buffer(15)), "gather_rows");
        let mut tokens = backend.zeros::<i32>("short", 1).unwrap();
        refused(backend.greedy(&floats(8), 2, 4, &mut tokens), "greedy");
    }
}
