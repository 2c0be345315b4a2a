//! Scales over tensor-parallel ranks, against vLLM's rule written out by hand, and FNUZ scales.

use proptest::prelude::*;
use quantkv::Error;
use quantkv::scale::{Granularity, LayerScales, Scales, StaticScale, kv_heads_of_rank};

/// A 70B's layout.
const HEADS: usize = 64;
const KV_HEADS: usize = 8;
const CHANNELS: usize = 4;

fn per_head(values: impl IntoIterator<Item = f32>) -> StaticScale {
    StaticScale::per_head("k", values.into_iter().collect()).unwrap()
}

/// Layer 0 has a K scale a head and a V scale a channel; layer 1 has one each.
fn scales() -> Scales {
    let channels = (0..KV_HEADS * CHANNELS).map(|i| (100 + i) as f32).collect();
    let fine = LayerScales {
        k: per_head((1..=KV_HEADS).map(|head| head as f32)),
        v: StaticScale::per_channel("v", CHANNELS, channels).unwrap(),
    };
    let coarse = LayerScales { k: StaticScale::per_tensor("k", 0.5).unwrap(), v: StaticScale::one() };
    // A query head's scale is its number; its group of eight has the last one's.
    let q: Vec<f32> = (0..HEADS).map(|head| (head + 1) as f32).collect();
    let q = StaticScale::max_of_groups("q", &q, KV_HEADS).unwrap();
    assert_eq!(q.values(), [8.0, 16.0, 24.0, 32.0, 40.0, 48.0, 56.0, 64.0]);
    Scales::new(HEADS, KV_HEADS, vec![fine, coarse]).unwrap().with_q(vec![Some(q), None]).unwrap()
}

/// The KV heads of every rank, as vLLM's loader slices `[rank * n .. (rank + 1) * n]`, or
/// `rank / (tp / total)` where heads are replicated.
#[test]
fn a_70b_over_1_to_16_ranks() {
    let all = scales();
    for (world, heads_of) in [
        (1, vec![vec![0, 1, 2, 3, 4, 5, 6, 7]]),
        (2, vec![vec![0, 1, 2, 3], vec![4, 5, 6, 7]]),
        (4, vec![vec![0, 1], vec![2, 3], vec![4, 5], vec![6, 7]]),
        (8, (0..8).map(|head| vec![head]).collect()),
        (16, [0, 0, 1, 1, 2, 2, 3, 3, 4, 4, 5, 5, 6, 6, 7, 7].map(|head| vec![head]).to_vec()),
    ] as [(usize, Vec<Vec<usize>>); 5]
    {
        assert_eq!(heads_of.len(), world);
        for (rank, heads) in heads_of.iter().enumerate() {
            let shard = all.shard(rank, world).unwrap();
            assert_eq!((shard.num_heads(), shard.num_kv_heads()), (HEADS / world, heads.len()));
            let fine = &shard.layers()[0];
            let want: Vec<f32> = heads.iter().map(|head| (head + 1) as f32).collect();
            assert_eq!((fine.k.values(), fine.k.granularity()), (&want[..], Granularity::Head), "{rank} of {world}");
            let row = |head: &usize| (0..CHANNELS).map(|c| (100 + head * CHANNELS + c) as f32).collect::<Vec<_>>();
            let want: Vec<f32> = heads.iter().flat_map(row).collect();
            assert_eq!((fine.v.values(), fine.v.granularity()), (&want[..], Granularity::Channel));
            assert_eq!(fine.v.get(heads.len() - 1, 3), want[want.len() - 1]);
            // The group's maximum over the whole model, also where a rank has half of the group.
            let want: Vec<f32> = heads.iter().map(|head| (8 * (head + 1)) as f32).collect();
            assert_eq!(shard.q()[0].as_ref().unwrap().values(), want);
            assert_eq!(shard.q()[1], None);
            assert_eq!(shard.layers()[1], all.layers()[1], "one scale for the tensor is every rank's");
        }
    }
    assert_eq!(all.shard(0, 1).unwrap(), all);
}

#[test]
fn what_cannot_be_dealt_out_is_refused() {
    let all = scales();
    for (rank, world, part) in [
        (0, 0, "ranks count"),
        (2, 2, "ranks count"),
        (usize::MAX, 4, "ranks count"),
        (0, 3, "do not divide the query heads"),
        (0, 128, "do not divide the query heads"),
        (0, usize::MAX, "do not divide the query heads"),
    ] {
        let error = all.shard(rank, world).unwrap_err();
        assert!(matches!(error, Error::Shard { num_heads: HEADS, num_kv_heads: KV_HEADS, .. }), "{error:?}");
        assert!(error.to_string().contains(part), "{error}");
    }
    // 12 query heads on 4 of KV: six ranks fit the former, and neither way the latter.
    let error = kv_heads_of_rank(0, 6, 12, 4).unwrap_err();
    assert!(matches!(error, Error::Shard { rank: 0, world: 6, num_heads: 12, num_kv_heads: 4, .. }), "{error:?}");
    assert!(matches!(kv_heads_of_rank(0, 1, 8, 3), Err(Error::Shard { .. })));
    assert!(matches!(kv_heads_of_rank(0, 1, 8, 0), Err(Error::Shard { .. })));

    for (heads, kv_heads) in [(8, 3), (0, 1), (8, 0), (0, 0)] {
        assert!(matches!(Scales::new(heads, kv_heads, Vec::new()), Err(Error::HeadsNotDivisible { .. })));
    }
    let three = LayerScales { k: per_head([1.0; 3]), v: StaticScale::one() };
    let error = Scales::new(8, 2, vec![LayerScales::one(), three]).unwrap_err();
    assert!(matches!(error, Error::InLayer { layer: 1, .. }), "{error:?}");
    let ones = Scales::new(8, 2, vec![LayerScales::one()]).unwrap();
    assert!(matches!(ones.clone().with_q(Vec::new()), Err(Error::LengthMismatch { .. })));
    let error = ones.with_q(vec![Some(per_head([1.0; 8]))]).unwrap_err();
    assert!(matches!(error, Error::InLayer { layer: 0, .. }), "{error:?}");
    for (values, kv_heads) in [(vec![1.0; 8], 3), (vec![], 1), (vec![1.0], 0)] {
        let result = StaticScale::max_of_groups("q", &values, kv_heads);
        assert!(matches!(result, Err(Error::HeadsNotDivisible { .. })));
    }
    let error = StaticScale::max_of_groups("q", &[1.0, f32::NAN], 1).unwrap_err();
    assert!(matches!(error, Error::InvalidScale { index: 1, .. }), "{error:?}");
}

#[test]
fn fnuz_scales_are_twice_as_large() {
    let doubled = scales().doubled_for_fnuz().unwrap();
    assert_eq!(doubled.layers()[0].k.values(), [2.0, 4.0, 6.0, 8.0, 10.0, 12.0, 14.0, 16.0]);
    assert_eq!(doubled.layers()[1].k.values(), [1.0]);
    assert_eq!(doubled.q()[0].as_ref().unwrap().values()[0], 16.0);
    let huge = LayerScales { k: StaticScale::one(), v: StaticScale::per_tensor("v", f32::MAX).unwrap() };
    let error = Scales::new(1, 1, vec![huge]).unwrap().doubled_for_fnuz().unwrap_err();
    assert!(matches!(&error, Error::InvalidScale { what, .. } if what == "layer 0 v_scale"), "{error:?}");
}

proptest! {
    /// Every rank's query heads read KV heads that the rank has, and all heads are somebody's.
    #[test]
    fn ranks_have_the_heads_their_queries_read(kv in 1usize..20, group in 1usize..9, world in 1usize..40) {
        let heads = kv * group;
        let mut owners = vec![0; kv];
        for rank in 0..world {
            match kv_heads_of_rank(rank, world, heads, kv) {
                Ok(range) => {
                    let each = heads / world;
                    for query in rank * each..(rank + 1) * each {
                        prop_assert!(range.contains(&(query / group)));
                    }
                    for head in range {
                        owners[head] += 1;
                    }
                }
                Err(_) => {
                    let fits = heads % world == 0 && (kv % world == 0 || world % kv == 0);
                    prop_assert!(!fits);
                    return Ok(());
                }
            }
        }
        let copies = if world > kv { world / kv } else { 1 };
        prop_assert!(owners.iter().all(|count| *count == copies), "{owners:?}");
    }
}
