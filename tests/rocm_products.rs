//! Who multiplies matrices on ROCm: what is said where rocBLAS is not there, and what its answers become. Its products
//! are compared with f64 in `decoder_ops.rs`.
#![cfg(feature = "rocm")]

#[path = "../testing/devices.rs"]
mod devices;

use std::fs;
use std::os::unix::fs::symlink;
use std::path::PathBuf;
use std::process::Command;

use half::f16;
use quantkv::decoder::compute::{Compute, RandomMatrix};
use quantkv::decoder::random;
use quantkv::decoder::rocm::{DecoderOptions, Products};
use quantkv::rocm::RocmBackend;
use quantkv::{Backend, DType, Element, Error};

const ROLE: &str = "QUANTKV_TEST_ROLE";
const ROWS: usize = 3;
const INPUTS: usize = 24;
const OUTPUTS: usize = 5;

fn with(products: Products) -> RocmBackend {
    RocmBackend::new(0).unwrap().with_decoder_options(DecoderOptions { products })
}

/// A product with a bias by `products`, and what f64 says it is.
fn product<A: Element>(products: Products, weights: DType) -> quantkv::Result<(Vec<f64>, Vec<f64>)>
where
    RocmBackend: Compute<A>,
{
    let backend = with(products);
    let numbers = |seed, len| {
        let mut values = vec![A::default(); len];
        random::fill(seed, 1.0, &mut values);
        values
    };
    let (x, bias) = (numbers(1, ROWS * INPUTS), numbers(2, OUTPUTS));
    let made = RandomMatrix { rows: OUTPUTS, cols: INPUTS, dtype: weights, seed: 3, deviation: 0.25 };
    let matrix = Compute::<A>::random_matrix(&backend, &made)?;
    let mut exact = vec![0.0f32; OUTPUTS * INPUTS];
    random::fill(3, 0.25, &mut exact);
    let stored = |x: f32| if weights == DType::F16 { f16::from_f32(x).to_f32() } else { x };

    let mut device_x = backend.zeros::<A>("x", x.len())?;
    let mut device_bias = backend.zeros::<A>("bias", bias.len())?;
    let mut out = backend.zeros::<A>("out", ROWS * OUTPUTS)?;
    backend.upload(&x, &mut device_x)?;
    backend.upload(&bias, &mut device_bias)?;
    backend.linear(&device_x, ROWS, &matrix, Some(&device_bias), &mut out)?;
    let mut got = vec![A::default(); ROWS * OUTPUTS];
    backend.download(&out, &mut got)?;

    let wide = |x: A| f64::from(x.to_f32());
    let sum = |row: usize, output: usize| -> f64 {
        let terms = (0..INPUTS).map(|i| wide(x[row * INPUTS + i]) * f64::from(stored(exact[output * INPUTS + i])));
        terms.sum::<f64>() + wide(bias[output])
    };
    let want = (0..ROWS * OUTPUTS).map(|at| sum(at / OUTPUTS, at % OUTPUTS)).collect();
    Ok((got.into_iter().map(wide).collect(), want))
}

/// Sums of 25 terms of size 1, in f32, and the result rounded to f16 if it is that.
fn assert_right(computed: quantkv::Result<(Vec<f64>, Vec<f64>)>, case: &str) {
    let (got, want) = computed.unwrap();
    for (got, want) in got.iter().zip(&want) {
        assert!((got - want).abs() <= 1e-5 + want.abs() / 2048.0, "{case}: {got}, expected {want}");
    }
}

/// Runs this program's test `name` in a process of its own: libraries are loaded once.
fn child(name: &str, role: &str, environment: &[(&str, &str)]) -> String {
    let mut command = Command::new(std::env::current_exe().unwrap());
    command.args([name, "--exact", "--nocapture"]).env(ROLE, role);
    command.envs(environment.iter().copied());
    let output = command.output().unwrap();
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    assert!(output.status.success(), "{role}: {text}{}", String::from_utf8_lossy(&output.stderr));
    text
}

/// Where the runtime is that this process has.
fn stand_in() -> Option<PathBuf> {
    let folders = std::env::var_os("LD_LIBRARY_PATH")?;
    std::env::split_paths(&folders).map(|folder| folder.join("libamdhip64.so.7")).find(|file| file.exists())
}

#[test]
fn without_the_library_products_are_our_own_unless_it_is_demanded() {
    const NAME: &str = "without_the_library_products_are_our_own_unless_it_is_demanded";
    if std::env::var_os(ROLE).is_some() {
        let error = with(Products::RocBlas).uses_rocblas().unwrap_err();
        println!("said: {error}");
        assert!(matches!(error, Error::NoKernel { backend: "rocm", call: "rocblas_create_handle", .. }), "{error:?}");
        assert!(matches!(product::<f32>(Products::RocBlas, DType::F32), Err(Error::NoKernel { .. })));
        for products in [Products::Auto, Products::Portable] {
            assert!(!with(products).uses_rocblas().unwrap());
            assert_right(product::<f32>(products, DType::F32), "our own kernel");
        }
        return;
    }
    if devices::rocm().is_none() || !devices::emulated() {
        return;
    }
    let Some(runtime) = stand_in() else { return };
    let folder = std::env::temp_dir().join(format!("quantkv-no-rocblas-{}", std::process::id()));
    let _ = fs::remove_dir_all(&folder);
    fs::create_dir_all(&folder).unwrap();
    symlink(&runtime, folder.join("libamdhip64.so.7")).unwrap();
    let path = folder.to_str().unwrap();
    let said = || child(NAME, "without", &[("LD_LIBRARY_PATH", path)]);
    assert!(said().contains("no librocblas.so.5 beside libamdhip64.so.7"), "{}", said());

    // Another library by its name; a copy of the runtime is another runtime.
    let pretender = folder.join("librocblas.so.5");
    symlink(&runtime, &pretender).unwrap();
    assert!(said().contains("librocblas.so.5 has no rocblas_create_handle"), "{}", said());
    fs::remove_file(&pretender).unwrap();
    fs::copy(&runtime, &pretender).unwrap();
    assert!(said().contains("linked with another runtime"), "{}", said());
    fs::remove_dir_all(folder).unwrap();
}

/// Only products of one type are the library's, and an answer of it is an error unless it says that it has no kernel.
#[test]
fn what_the_library_answers() {
    if let Some(role) = std::env::var_os(ROLE) {
        let by_library = product::<f32>(Products::RocBlas, DType::F32);
        match role.to_str().unwrap() {
            "refused" => {
                let Err(Error::Device { backend: "rocm", call: "rocblas_gemm_ex", code: 11, message }) = by_library
                else {
                    panic!("{by_library:?}")
                };
                assert_eq!(message, "rocblas_status_invalid_value");
            }
            "no kernel" => assert_right(by_library, "by our own kernel instead"),
            // Nothing but the bias was written: whoever answers that it is done is believed.
            "slower" => {
                let (got, _) = by_library.unwrap();
                assert!(got.chunks(OUTPUTS).all(|row| row == &got[..OUTPUTS]), "{got:?}");
            }
            role => panic!("{role}"),
        }
        assert_right(product::<f32>(Products::RocBlas, DType::F16), "weights of another type");
        assert_right(product::<f16>(Products::Portable, DType::F16), "the portable kernel");
        return;
    }
    if devices::rocm().is_none() || !devices::emulated() {
        return;
    }
    if let Err(reason) = with(Products::RocBlas).uses_rocblas() {
        println!("skipped: {reason}");
        return;
    }
    for (role, status) in [("refused", "11"), ("no kernel", "2"), ("no kernel", "14"), ("slower", "7")] {
        child("what_the_library_answers", role, &[("QUANTKV_AMD_GEMM_STATUS", status)]);
    }
    assert_right(product::<f32>(Products::RocBlas, DType::F32), "f32");
    assert_right(product::<f16>(Products::RocBlas, DType::F16), "f16");
}

/// A handle's workspace is freed before its stream goes, whoever goes last; the stand-in aborts otherwise.
#[test]
fn handles_end_before_their_streams() {
    if devices::rocm().is_none() {
        return;
    }
    let backend = with(Products::Auto);
    let made = RandomMatrix { rows: 4, cols: 8, dtype: DType::F32, seed: 1, deviation: 1.0 };
    let matrix = Compute::<f32>::random_matrix(&backend, &made).unwrap();
    let x = backend.zeros::<f32>("x", 8).unwrap();
    let mut out = backend.zeros::<f32>("out", 4).unwrap();
    for backend in [backend.clone(), backend.with_decoder_options(DecoderOptions::default()), backend] {
        backend.linear(&x, 1, &matrix, None, &mut out).unwrap();
    }
    let mut zeros = [1.0f32; 4];
    let other = with(Products::Auto);
    assert!(matches!(other.linear(&x, 1, &matrix, None, &mut out), Err(Error::OtherStream { .. })));
    other.download(&out, &mut zeros).unwrap_err();
    drop((out, x));
    drop(matrix);
}
