//! The slice codecs: bytes read and written a second, per instruction set, format and type.
//!
//! `row`: 128 elements, a head's row, where the call itself counts. `slab`: 64 Ki elements, in the
//! second-level cache. Each form is compared with the scalar codec before it is timed.

use std::hint::black_box;

use criterion::{BenchmarkId, Criterion, Throughput, criterion_group, criterion_main};
use half::bf16;
use quantkv::codec::{ScaleRow, absmax_slice, decode_slice, e4m3, e4m3fnuz, e5m2, encode_slice};
use quantkv::{Element, Isa, KvFormat};

type Encode = fn(f32) -> u8;
type Decode = fn(u8) -> f32;
const FORMATS: [(KvFormat, Encode, Decode); 3] = [
    (KvFormat::Fp8E4M3, e4m3::encode, e4m3::decode),
    (KvFormat::Fp8E5M2, e5m2::encode, e5m2::decode),
    (KvFormat::Fp8E4M3Fnuz, e4m3fnuz::encode, e4m3fnuz::decode),
];
const SIZES: [(&str, usize); 2] = [("row", 128), ("slab", 1 << 16)];
const SCALE: f32 = 0.013;

fn isas() -> impl Iterator<Item = Isa> {
    Isa::ALL.into_iter().filter(|isa| isa.is_available())
}

/// Numbers of the sort keys and values are made of: mostly around 1, some tiny, some past the end.
fn source<T: Element>(len: usize) -> Vec<T> {
    (0..len as u32)
        .map(|i| {
            let noise = (i.wrapping_mul(0x9e37_79b9) >> 8) as f32 / (1 << 23) as f32 - 1.0;
            T::from_f32(noise * [1.0, 3.0, 0.01, 1e-4, 9.0][i as usize % 5])
        })
        .collect()
}

fn encode<T: Element>(c: &mut Criterion) {
    for (size, len) in SIZES {
        let mut group = c.benchmark_group(format!("encode/{}/{size}", T::DTYPE));
        group.throughput(Throughput::Bytes((len * (size_of::<T>() + 1)) as u64));
        let src = source::<T>(len);
        let mut codes = vec![0; len];
        for (format, scalar, _) in FORMATS {
            let expected: Vec<u8> = src.iter().map(|x| scalar(x.to_f32() / SCALE)).collect();
            for isa in isas() {
                encode_slice(isa, format, &src, ScaleRow::One(SCALE), &mut codes);
                assert_eq!(codes, expected, "{isa} {format}");
                group.bench_function(BenchmarkId::new(format.name(), isa), |b| {
                    b.iter(|| encode_slice(isa, format, black_box(&src), ScaleRow::One(SCALE), black_box(&mut codes)))
                });
            }
        }
    }
}

fn decode<T: Element>(c: &mut Criterion) {
    for (size, len) in SIZES {
        let mut group = c.benchmark_group(format!("decode/{}/{size}", T::DTYPE));
        group.throughput(Throughput::Bytes((len * (size_of::<T>() + 1)) as u64));
        let mut values = vec![T::default(); len];
        for (format, encode, scalar) in FORMATS {
            let codes: Vec<u8> = source::<f32>(len).into_iter().map(|x| encode(x / SCALE)).collect();
            let expected: Vec<T> = codes.iter().map(|code| T::from_f32(scalar(*code) * SCALE)).collect();
            for isa in isas() {
                decode_slice(isa, format, &codes, ScaleRow::One(SCALE), &mut values);
                assert_eq!(values, expected, "{isa} {format}");
                group.bench_function(BenchmarkId::new(format.name(), isa), |b| {
                    b.iter(|| {
                        decode_slice(isa, format, black_box(&codes), ScaleRow::One(SCALE), black_box(&mut values))
                    })
                });
            }
        }
    }
}

fn absmax<T: Element>(c: &mut Criterion) {
    let mut group = c.benchmark_group(format!("absmax/{}/slab", T::DTYPE));
    let src = source::<T>(1 << 16);
    group.throughput(Throughput::Bytes(size_of_val(&src[..]) as u64));
    let expected = src.iter().map(|x| x.to_f32().abs()).fold(0.0, f32::max);
    for isa in isas() {
        assert_eq!(absmax_slice(isa, &src), expected, "{isa}");
        group.bench_function(BenchmarkId::from_parameter(isa), |b| b.iter(|| absmax_slice(isa, black_box(&src))));
    }
}

criterion_group! {
    name = codec;
    config = Criterion::default()
        .warm_up_time(std::time::Duration::from_millis(300))
        .measurement_time(std::time::Duration::from_secs(1));
    targets = encode::<bf16>, encode::<f32>, decode::<bf16>, decode::<f32>, absmax::<bf16>, absmax::<f32>
}
criterion_main!(codec);
