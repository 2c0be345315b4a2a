//! Dense conversions and the way from data to scales: `quantize`, `dequantize`, `absmax`,
//! `update_scales`. All bit for bit.

#[path = "../testing/devices.rs"]
mod devices;
#[path = "../testing/oracle/mod.rs"]
mod oracle;

use devices::devices;
use oracle::formats::{bytes_of, same_stored, same_value};
use oracle::geometry::Scales;
use oracle::rows::{self, ConvertCase};
use oracle::run;
use oracle::strategy::{self, Padding, Rng, ScaleKind};
use proptest::prelude::*;
use quantkv::scale::Granularity;
use quantkv::{Backend, DType, KvFormat};

#[derive(Clone, Debug)]
struct Parameters {
    shape: (usize, usize, usize),
    format: KvFormat,
    dtype: DType,
    scale: ScaleKind,
    padding: Padding,
    tail: usize,
    seed: u64,
}

fn parameters() -> impl Strategy<Value = Parameters> {
    let shape = (0usize..20, 1usize..6, strategy::head_dim());
    let tail = prop_oneof![Just(0usize), Just(33)];
    (shape, strategy::format(), strategy::dtype(), strategy::scale_kind(), strategy::padding(), tail, any::<u64>())
        .prop_map(|(shape, format, dtype, scale, padding, tail, seed)| Parameters {
            shape,
            format,
            dtype,
            scale,
            padding,
            tail,
            seed,
        })
}

fn build(parameters: &Parameters) -> ConvertCase {
    let Parameters { shape: (tokens, heads, dim), format, dtype, scale, padding, tail, seed } = *parameters;
    let mut rng = Rng::new(seed);
    let scale = strategy::scales(scale, heads, dim, || rng.any_scale());
    let rows = strategy::rows((tokens, heads, dim), padding, dtype, || rng.any_activation());
    let codes = (0..tokens * heads * dim * bytes_of(format) + tail).map(|_| rng.bits() as u8).collect();
    ConvertCase { tokens, heads, dim, format, dtype, scale, rows, codes }
}

fn check<B: Backend>(backend: &B, case: &ConvertCase) -> Result<(), String> {
    check_against(backend, case, &(rows::quantize(case), rows::dequantize(case)))
}

fn check_against<B: Backend>(
    backend: &B,
    case: &ConvertCase,
    (codes, rows): &(Vec<u8>, rows::Rows),
) -> Result<(), String> {
    let size = bytes_of(case.format);
    let (expected, got) = (codes, run::quantize(backend, case).map_err(|error| error.to_string())?);
    for (at, (a, b)) in expected.chunks(size).zip(got.chunks(size)).enumerate() {
        if a != b && !(a.len() == size && same_stored(case.format, a, b)) {
            return Err(format!("code {at} is {b:02x?}, not {a:02x?}"));
        }
    }
    let (expected, got) = (rows, run::dequantize(backend, case).map_err(|error| error.to_string())?);
    match (0..expected.data.len()).find(|&at| !same_value(expected.data[at], got.data[at])) {
        Some(at) => Err(format!("value {at} is {:e}, not {:e}", got.data[at], expected.data[at])),
        None => Ok(()),
    }
}

proptest! {
    #![proptest_config(strategy::config(192))]

    #[test]
    fn conversions_are_exact(parameters in parameters()) {
        let case = build(&parameters);
        for device in devices() {
            prop_assert_eq!(on_device!(&device, |backend| check(backend, &case)), Ok(()), "on {}", device);
        }
    }

    #[test]
    fn maxima_are_exact(
        parameters in parameters(), seed in any::<u64>(), percent_seen in prop_oneof![Just(0u64), Just(50)],
        granularity in prop::sample::select(vec![Granularity::Tensor, Granularity::Head, Granularity::Channel]),
    ) {
        let case = build(&parameters);
        let mut rng = Rng::new(seed);
        let shape = parameters.shape;
        let len = match granularity {
            Granularity::Tensor => 1,
            Granularity::Head => shape.1,
            Granularity::Channel => shape.1 * shape.2,
        };
        let running: Vec<f32> = (0..len).map(|_| if rng.chance(percent_seen) { rng.normal().abs() * 9.0 } else { 0.0 }).collect();
        let expected = rows::absmax(&case.rows, shape, granularity, &running);
        for device in devices() {
            let got = on_device!(&device, |backend| run::absmax(backend, &case.rows, case.dtype, shape, granularity, &running)).unwrap();
            let bits = |all: &[f32]| all.iter().map(|x| x.to_bits()).collect::<Vec<_>>();
            prop_assert_eq!(bits(&got), bits(&expected), "on {}: {:?} {:?}", device, got, expected);
        }
    }

    #[test]
    fn scales_follow_maxima(seed in any::<u64>(), len in 1usize..70, divisor in prop_oneof![Just(200f32), Just(100.0), Just(448.0), Just(1.0)]) {
        let mut rng = Rng::new(seed);
        const EDGES: [f32; 5] = [0.0, 1e-45, f32::MIN_POSITIVE, f32::MAX, 1.0];
        let absmax: Vec<f32> =
            (0..len).map(|_| if rng.chance(30) { EDGES[rng.below(5)] } else { rng.normal().abs() * 50.0 }).collect();
        for device in devices() {
            let got = on_device!(&device, |backend| run::update_scales(backend, &absmax, divisor)).unwrap();
            for (&x, &scale) in absmax.iter().zip(&got) {
                prop_assert_eq!(scale, rows::update_scale(x, divisor), "absmax {:e} on {}", x, device);
                prop_assert!(scale.is_finite() && scale > 0.0);
            }
        }
    }
}

/// More tokens than the blocks of a grid take at once: each goes on to further ones, and none is left out.
#[test]
fn maxima_of_more_tokens_than_a_grid_takes() {
    let shape = (8192 + 70, 1, 3);
    for largest in [8191, shape.0 - 1] {
        let mut rows = strategy::rows(shape, (0, 0, 0), DType::F32, || 0.25);
        rows.data[3 * largest + 1] = -7.0;
        for device in devices() {
            let got = on_device!(&device, |backend| run::absmax(
                backend,
                &rows,
                DType::F32,
                shape,
                Granularity::Channel,
                &[0.0; 3]
            ));
            assert_eq!(got.unwrap(), [0.25, 7.0, 0.25], "token {largest} on {device}");
        }
    }
}

/// vLLM's first-batch rule: K / 200, V / 100, and 1.0 where nothing but zeros (or NaN) was seen.
#[test]
fn first_batch_scales() {
    let shape = (3, 2, 4);
    for (rows, expected) in [
        (vec![0.0, -6.0, 2.0, 1.0], 6.0 / 200.0),
        (vec![0.0, -0.0, 0.0, 0.0], 1.0),
        (vec![f32::NAN, 0.0, f32::NAN, -0.0], 1.0),
        (vec![f32::NEG_INFINITY, 0.0, 1.0, 2.0], f32::MAX / 200.0),
    ] {
        let mut next = rows.iter().cycle();
        let rows = strategy::rows(shape, (0, 0, 0), DType::F32, || *next.next().unwrap());
        for device in devices() {
            let maxima = on_device!(&device, |backend| run::absmax(
                backend,
                &rows,
                DType::F32,
                shape,
                Granularity::Tensor,
                &[0.0]
            ))
            .unwrap();
            assert_eq!(
                on_device!(&device, |backend| run::update_scales(backend, &maxima, 200.0)).unwrap(),
                [expected],
                "{}",
                device
            );
        }
    }
}

/// vLLM's `test_fp8_e4m3_conversion`: uniform in ±224 to codes and back with scale 1 is within
/// half a step, 1/16 of the value, or half the smallest subnormal.
#[test]
fn vllm_round_trip_error() {
    let mut rng = Rng::new(21);
    for (format, relative, absolute) in [
        (KvFormat::Fp8E4M3, 1.0 / 16.0, 2f32.powi(-10)),
        (KvFormat::Fp8E5M2, 1.0 / 8.0, 2f32.powi(-17)),
        (KvFormat::Fp8E4M3Fnuz, 1.0 / 16.0, 2f32.powi(-11)),
    ] {
        let shape = (64, 4, 16);
        let rows = strategy::rows(shape, (0, 0, 0), DType::F16, || rng.unit() * 224.0);
        let mut case = ConvertCase {
            tokens: 64,
            heads: 4,
            dim: 16,
            format,
            dtype: DType::F16,
            scale: Scales::tensor(1.0),
            codes: vec![0; 64 * 64],
            rows: rows.clone(),
        };
        for device in devices() {
            case.codes = on_device!(&device, |backend| run::quantize(backend, &case)).unwrap();
            let back = on_device!(&device, |backend| run::dequantize(backend, &case)).unwrap();
            for (x, y) in rows.data.iter().zip(&back.data) {
                assert!((x - y).abs() <= (x.abs() * relative).max(absolute), "{format}: {x} became {y}");
            }
        }
    }
}

/// Enough bytes that the work is shared among threads, exact for any number of them.
#[test]
fn large_conversions_on_any_number_of_threads() {
    for format in KvFormat::ALL {
        let shape = (700, 4, 128);
        let parameters = Parameters {
            shape,
            format,
            dtype: DType::BF16,
            scale: ScaleKind::Channel,
            padding: (0, 9, 0),
            tail: 33,
            seed: 31,
        };
        let case = build(&parameters);
        let expected = (rows::quantize(&case), rows::dequantize(&case));
        for device in devices() {
            device.in_pools(|threads| {
                let what = format!("{format} on {} with {threads} threads", device);
                assert_eq!(on_device!(&device, |backend| check_against(backend, &case, &expected)), Ok(()), "{what}");
                for granularity in [Granularity::Tensor, Granularity::Head, Granularity::Channel] {
                    let running = vec![0.5; granularity.len(4, 128)];
                    let expected = rows::absmax(&case.rows, shape, granularity, &running);
                    let got = on_device!(&device, |backend| run::absmax(
                        backend,
                        &case.rows,
                        case.dtype,
                        shape,
                        granularity,
                        &running
                    ))
                    .unwrap();
                    assert_eq!(got, expected, "{what}");
                }
            });
        }
    }
}
