//! The flags that say where scales come from, and what is told of them.
//!
//! ```text
//! --kv-scales SOURCE | GRANULARITY | SOURCE,GRANULARITY
//!     SOURCE          checkpoint, first-batch, running, running:TOKENS, dynamic
//!     GRANULARITY     tensor, head, channel
//! --calculate-kv-scales       first-batch
//! --scales-file F             the file
//! ```

use quantkv::decoder::kv_scales::{Divisors, OnTheFly, ScaleOptions, ScaleSource};
use quantkv::decoder::warm_up::RunningScales;
use quantkv::layout::DynamicScales;
use quantkv::scale::{Granularity, LayerScales};
use serde_json::{Value, json};

use crate::args::Args;
use crate::common::program::Failure;
use crate::common::program::positive;
use crate::report::RunReport;

/// `--kv-scales`.
#[derive(Clone, Copy, Debug, Default)]
pub struct KvScalesFlag {
    source: Option<Source>,
    granularity: Option<Granularity>,
}

/// A source that needs no file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Source {
    Checkpoint,
    FirstBatch,
    /// With the tokens of the warm-up, if they are said.
    Running(Option<usize>),
    Dynamic,
}

pub fn kv_scales(text: &str) -> Result<KvScalesFlag, String> {
    let mut flag = KvScalesFlag::default();
    for part in text.split(',') {
        let (name, tokens) = match part.split_once(':') {
            Some(("running", tokens)) => ("running", Some(positive(tokens)?)),
            Some(_) => return Err(format!("{part:?} takes no number, running:TOKENS does")),
            None => (part, None),
        };
        let (source, granularity) = match name {
            "checkpoint" => (Some(Source::Checkpoint), None),
            "first-batch" => (Some(Source::FirstBatch), None),
            "running" => (Some(Source::Running(tokens)), None),
            "dynamic" => (Some(Source::Dynamic), None),
            "tensor" => (None, Some(Granularity::Tensor)),
            "head" => (None, Some(Granularity::Head)),
            "channel" => (None, Some(Granularity::Channel)),
            _ => {
                return Err(format!(
                    "{part:?} is none of checkpoint, first-batch, running, running:TOKENS, dynamic, tensor, head, channel"
                ));
            }
        };
        let twice = |what: &str| Err(format!("{text:?} names two {what}"));
        match (source, granularity) {
            (Some(_), _) if flag.source.is_some() => return twice("sources of scales"),
            (_, Some(_)) if flag.granularity.is_some() => return twice("granularities"),
            _ => {}
        }
        flag = KvScalesFlag { source: source.or(flag.source), granularity: granularity.or(flag.granularity) };
    }
    Ok(flag)
}

/// `--kv-scale-divisors`.
pub fn divisors(text: &str) -> Result<Divisors, String> {
    let numbers: Option<Vec<f32>> = text.split(',').map(|part| part.trim().parse().ok()).collect();
    let Some(&[k, v]) = numbers.as_deref() else { return Err("expected two numbers, such as 200,100".into()) };
    let divisors = Divisors { k, v };
    divisors.validate().map_err(|error| error.to_string())?;
    Ok(divisors)
}

/// `--kv-scale-headroom`.
pub fn headroom(text: &str) -> Result<f32, String> {
    let headroom = text.parse().map_err(|_| "expected a number, such as 1.25".to_owned())?;
    RunningScales { headroom, ..RunningScales::default() }.validate().map_err(|error| error.to_string())?;
    Ok(headroom)
}

/// What the flags ask for together.
pub fn options(args: &Args) -> Result<ScaleOptions<'_>, Failure> {
    let flag = args.kv_scales.unwrap_or_default();
    let other = [("--calculate-kv-scales", args.calculate_kv_scales), ("--scales-file", args.scales_file.is_some())];
    if let (Some(_), Some((name, _))) = (flag.source, other.iter().find(|(_, given)| *given)) {
        return Err(Failure::User(format!(
            "{name} and the source of --kv-scales cannot be used together: both say where scales come from"
        )));
    }
    let source = match (flag.source, &args.scales_file) {
        (_, Some(path)) => ScaleSource::File(path),
        (Some(Source::FirstBatch), _) => ScaleSource::FirstBatch,
        (Some(Source::Running(_)), _) => ScaleSource::Running,
        (Some(Source::Dynamic), _) => ScaleSource::Dynamic,
        (None, _) if args.calculate_kv_scales => ScaleSource::FirstBatch,
        (None | Some(Source::Checkpoint), _) => ScaleSource::Checkpoint,
    };
    let missing = args.missing_kv_scales.into();
    let mut options = ScaleOptions { granularity: flag.granularity, missing, ..source.into() };
    if let Some(divisors) = args.kv_scale_divisors {
        options.divisors = divisors;
    }
    if let Some(Source::Running(Some(tokens))) = flag.source {
        options.running.tokens = tokens;
    }
    if let Some(headroom) = args.kv_scale_headroom {
        options.running.headroom = headroom;
    }
    for (name, given, of) in [
        ("--kv-scale-divisors", args.kv_scale_divisors.is_some(), ScaleSource::FirstBatch),
        ("--kv-scale-headroom", args.kv_scale_headroom.is_some(), ScaleSource::Running),
    ] {
        if given && of != source {
            let flag = if of == ScaleSource::Running { "--kv-scales running" } else { "--calculate-kv-scales" };
            return Err(Failure::User(format!("{name} needs {flag}")));
        }
    }
    Ok(options)
}

/// What a run says of its scales beside their values.
#[derive(Clone, Debug)]
pub struct ScaleReport {
    source: &'static str,
    granularity: [&'static str; 2],
    on_the_fly: Option<OnTheFly>,
    dynamic: bool,
}

impl ScaleReport {
    /// `layers` are those of the cache.
    pub fn new(plan: &crate::setup::Plan, layers: &[LayerScales]) -> Self {
        let dynamic = plan.scales.dynamic == DynamicScales::PerSlotHead;
        let granularity = match layers.first() {
            _ if dynamic => ["token_head"; 2],
            Some(first) => [first.k.granularity().name(), first.v.granularity().name()],
            None => ["tensor"; 2],
        };
        let source = if plan.engine.format.is_quantized() { plan.scale_source } else { "none" };
        ScaleReport { source, granularity, on_the_fly: plan.scales.on_the_fly, dynamic }
    }

    pub fn json(&self, run: &RunReport) -> Value {
        let [k_granularity, v_granularity] = self.granularity;
        let mut object = json!({
            "source": self.source,
            "k_granularity": k_granularity,
            "v_granularity": v_granularity,
            // Tokens that they were computed from; dynamic scales are never frozen.
            "frozen_after_tokens":
                (run.stats.scales_frozen && !self.dynamic).then_some(run.stats.scale_tokens),
        });
        match self.on_the_fly {
            Some(OnTheFly::FirstBatch(Divisors { k, v })) => object["divisors"] = json!([k, v]),
            Some(OnTheFly::Running(running)) => {
                object["warm_up_tokens"] = json!(running.tokens);
                object["headroom"] = json!(running.headroom);
                object["scale_changes"] = json!(run.stats.scale_changes);
            }
            None => {}
        }
        object
    }

    /// A line of the closing table, where there is something to say.
    pub fn line(&self, run: &RunReport) -> Option<String> {
        let stats = &run.stats;
        let per = self.granularity[0];
        match self.on_the_fly {
            None if self.dynamic => Some("dynamic, one for each token and KV head".into()),
            None => None,
            Some(OnTheFly::FirstBatch(Divisors { k, v })) => {
                Some(format!("per {per}, K/{k} and V/{v} of the first {} tokens", stats.scale_tokens))
            }
            Some(OnTheFly::Running(running)) => Some(format!(
                "per {per}, running with headroom {}, {} after {} tokens and {} changes of a layer's",
                running.headroom,
                if stats.scales_frozen { "frozen" } else { "not yet frozen" },
                stats.scale_tokens,
                stats.scale_changes
            )),
        }
    }
}
