//! From flags and a model folder to requests and an engine's sizes.

use std::io::Read;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use quantkv::decoder::chat::{ChatTemplate, Message};
use quantkv::decoder::engine::Request;
use quantkv::decoder::kv_scales::{KvScales, resolve};
use quantkv::decoder::sampling::SamplingParams;
use quantkv::decoder::tokenizer::Tokenizer;
use quantkv::decoder::{Compute, Config, EngineConfig, GenerationConfig, Model, Weights, known};
use quantkv::{CacheSpec, CpuBackend, DType, Element, KvCacheDtype};
use rand::rngs::ChaCha12Rng;
use rand::{Rng, SeedableRng};

use crate::args::Args;
use crate::bundled;
use crate::common::device::{Device, Machine, Products};
use crate::common::program::Failure;
use crate::scales;

/// A prompt the bundled model can answer.
const BUNDLED_PROMPT: &str = "Tom's silver coin is in the quiet garden. The wind was cold that day. \
    Ana's old map was left in the tall tower. Where is Tom's coin?";
const DEFAULT_KV_MEMORY: usize = 64 << 20;
const DEFAULT_SWAP_MEMORY: usize = 64 << 20;
const MAX_PROMPTS_FILE: u64 = 64 << 20;
const DEFAULT_MAX_TOKENS: usize = 128;

/// A prompt as text and as tokens.
pub struct Prompt {
    pub text: String,
    pub ids: Vec<u32>,
}

/// Where the weights come from.
pub enum Source {
    Checkpoint {
        dir: PathBuf,
        config: Config,
        weights: Weights,
    },
    /// Made up, for the shape of this name.
    Random {
        name: String,
        config: Config,
    },
}

impl Source {
    pub fn open(args: &Args) -> Result<Source, Failure> {
        if let Some(name) = &args.random_weights {
            let dir = Path::new(name);
            let config = if dir.join("config.json").exists() { Config::from_dir(dir)? } else { known::named(name)? };
            if !has_ids(args) {
                return Err(Failure::User("no prompt: give --prompt-length or --prompt-ids".into()));
            }
            return Ok(Source::Random { name: name.clone(), config });
        }
        let dir = match &args.model {
            Some(dir) => dir.clone(),
            None => bundled::model_dir()?,
        };
        let (config, weights) = (Config::from_dir(&dir)?, Weights::open(&dir)?);
        Ok(Source::Checkpoint { dir, config, weights })
    }

    /// The model's own dtype.
    pub fn dtype(&self) -> Result<DType, Failure> {
        match self {
            Source::Random { config, .. } => Ok(config.dtype.unwrap_or(DType::BF16)),
            Source::Checkpoint { config: Config { dtype: Some(dtype), .. }, .. } => Ok(*dtype),
            Source::Checkpoint { weights, .. } => Ok(weights.tensor("model.embed_tokens.weight")?.dtype()),
        }
    }
}

/// What is loaded once.
pub struct Session<B: Compute<A>, A: Element> {
    /// The model's folder, or the name of its shape.
    pub name: String,
    /// `cpu`, `cuda:0`; and in words.
    pub device: String,
    pub device_description: String,
    pub model: Model<B, A>,
    pub tokenizer: Option<Arc<Tokenizer>>,
    pub prompts: Vec<Prompt>,
    generation: GenerationConfig,
    /// One line each, for the user.
    pub notes: Vec<String>,
}

/// Sizes and scales of one cache.
pub struct Plan {
    pub engine: EngineConfig,
    pub scales: KvScales,
    pub scale_source: &'static str,
    pub block_bytes: usize,
    /// Bytes a token takes in all layers, in this cache and in one of the model's own dtype.
    pub bytes_per_token: usize,
    pub bytes_per_token_auto: usize,
}

impl<B: Compute<A> + Machine, A: Element> Session<B, A> {
    pub fn load(args: &Args, source: Source, backend: B) -> Result<Self, Failure> {
        let (device, device_description) = (backend.label(), backend.describe());
        let (name, dir, model) = match source {
            Source::Checkpoint { dir, config, weights } => {
                let model = Model::from_parts(config, weights, Arc::new(backend))?;
                (dir.display().to_string(), Some(dir), model)
            }
            Source::Random { name, config } => {
                let element_bytes = config.dtype.unwrap_or(DType::BF16).bytes();
                let bytes = config.num_parameters().saturating_mul(element_bytes);
                check_memory(&backend, "the weights", bytes, "a smaller model")?;
                (name, None, Model::random(config, args.seed, Arc::new(backend))?)
            }
        };
        let generation = dir.as_deref().map_or(Ok(GenerationConfig::default()), GenerationConfig::from_dir)?;
        let tokenizer = match &dir {
            None => None,
            // Token ids alone need none.
            Some(dir) if !dir.join("tokenizer.json").exists() && has_ids(args) => None,
            Some(dir) => Some(Arc::new(Tokenizer::from_model_dir(dir)?)),
        };
        let notes = Vec::new();
        let mut session =
            Session { name, device, device_description, model, tokenizer, prompts: Vec::new(), generation, notes };
        session.prompts = session.read_prompts(args, dir.as_deref())?;
        session.note_what_has_no_effect(args);
        Ok(session)
    }

    fn note_what_has_no_effect(&mut self, args: &Args) {
        if self.sampling(args).is_greedy() {
            let given = [
                ("--top-p", args.top_p.is_some()),
                ("--top-k", args.top_k.is_some()),
                ("--min-p", args.min_p.is_some()),
            ];
            for (flag, _) in given.iter().filter(|(_, given)| *given) {
                self.notes.push(format!("{flag} has no effect at temperature 0"));
            }
        }
        if args.machine.device == Device::Cpu {
            for (flag, given) in
                [("--products", args.machine.products != Products::Auto), ("--no-graphs", args.no_graphs)]
            {
                if given {
                    self.notes.push(format!("{flag} has no effect on the CPU"));
                }
            }
        }
    }

    fn read_prompts(&self, args: &Args, dir: Option<&Path>) -> Result<Vec<Prompt>, Failure> {
        if let Some(length) = args.prompt_length {
            return Ok((0..args.batch).map(|number| self.random_prompt(args.seed, number, length)).collect());
        }
        if !args.prompt_ids.is_empty() {
            let text = |ids: &[u32]| self.tokenizer.as_ref().map_or(Ok(String::new()), |t| t.decode(ids, false));
            return args.prompt_ids.iter().map(|ids| Ok(Prompt { text: text(&ids.0)?, ids: ids.0.clone() })).collect();
        }
        let texts = match &args.prompts_file {
            Some(path) => read_lines(path)?,
            None if !args.prompt.is_empty() => args.prompt.clone(),
            None if args.model.is_none() => vec![BUNDLED_PROMPT.to_owned()],
            None => {
                return Err(Failure::User("no prompt: give --prompt, --prompt-ids or --prompts-file".into()));
            }
        };
        let (Some(tokenizer), Some(dir)) = (&self.tokenizer, dir) else { return Ok(Vec::new()) };
        if !args.chat {
            return texts.into_iter().map(|text| Ok(Prompt { ids: tokenizer.encode(&text, true)?, text })).collect();
        }
        let Some(template) = ChatTemplate::from_model_dir(dir)? else {
            let dir = dir.display();
            return Err(Failure::User(format!(
                "{dir} has no chat template (chat_template.jinja, or chat_template in tokenizer_config.json)"
            )));
        };
        texts
            .into_iter()
            .map(|text| {
                let text = template.render(&[Message::new("user", text)], true)?;
                // The template has printed its special tokens.
                Ok(Prompt { ids: tokenizer.encode(&text, false)?, text })
            })
            .collect()
    }

    /// Tokens that no other prompt begins with, so that none are shared.
    fn random_prompt(&self, seed: u64, number: usize, length: usize) -> Prompt {
        let mut generator = ChaCha12Rng::seed_from_u64(seed);
        generator.set_stream(number as u64);
        let vocab_size = self.model.config().vocab_size as u64;
        let ids = (0..length).map(|_| (generator.next_u64() % vocab_size) as u32).collect();
        Prompt { text: String::new(), ids }
    }

    /// Flags over generation_config.json over greedy.
    fn sampling(&self, args: &Args) -> SamplingParams {
        let file = &self.generation;
        let file_temperature = if file.do_sample == Some(true) { file.temperature.unwrap_or(1.0) } else { 0.0 };
        SamplingParams {
            temperature: args.temperature.unwrap_or(file_temperature),
            top_k: args.top_k.or(file.top_k).unwrap_or(0),
            top_p: args.top_p.or(file.top_p).unwrap_or(1.0),
            min_p: args.min_p.or(file.min_p).unwrap_or(0.0),
            repetition_penalty: args.repetition_penalty.or(file.repetition_penalty).unwrap_or(1.0),
            frequency_penalty: args.frequency_penalty,
            presence_penalty: args.presence_penalty,
            seed: args.seed,
        }
    }

    /// A request for each prompt.
    pub fn requests(&self, args: &Args) -> Result<Vec<Request>, Failure> {
        let file = &self.generation;
        let eos = file.eos_token_ids.as_ref().unwrap_or(&self.model.config().eos_token_ids);
        let from_file = file.max_new_tokens.filter(|n| *n > 0);
        let request = |prompt: &Prompt| Request {
            prompt: prompt.ids.clone(),
            n: args.n,
            sampling: self.sampling(args),
            max_tokens: args.max_tokens.or(from_file).unwrap_or(DEFAULT_MAX_TOKENS),
            stop: args.stop.clone(),
            eos_token_ids: if args.ignore_eos || args.prompt_length.is_some() { Vec::new() } else { eos.clone() },
        };
        Ok(self.prompts.iter().map(request).collect())
    }

    /// Sizes and scales of a cache of `dtype`.
    pub fn plan(&self, args: &Args, dtype: KvCacheDtype) -> Result<Plan, Failure> {
        let (model, layers) = (&self.model, self.model.config().num_layers);
        let format = dtype.resolve(model.dtype());
        let options = scales::options(args)?;
        let scale_source = options.source.name();
        let mut scales = resolve(model.config(), model.weights(), format, options).map_err(explain_scales)?;
        if args.random_weights.is_some() {
            // There is no checkpoint to have scales, and no sense to lose.
            scales.warnings.clear();
        }
        let spec = scales.cache_spec(model.cache_spec(args.block_size, format)?)?;
        let auto = model.cache_spec(args.block_size, KvCacheDtype::Auto.resolve(model.dtype()))?;
        let num_blocks = match args.num_blocks {
            Some(blocks) => blocks,
            None => {
                let budget = spec.blocks_for_budget(layers, args.kv_memory.unwrap_or(DEFAULT_KV_MEMORY))?;
                if args.kv_memory.is_none() { budget.max(self.blocks_for_random_prompts(args, &spec)?) } else { budget }
            }
        };
        let block_bytes = spec.bytes_per_block()?.saturating_mul(layers);
        let cache_bytes = num_blocks.saturating_mul(block_bytes);
        check_memory(&**model.backend(), "the cache", cache_bytes, "a smaller --kv-memory or --num-blocks")?;
        let engine = EngineConfig {
            block_size: args.block_size,
            swap_blocks: args.swap_blocks.unwrap_or((DEFAULT_SWAP_MEMORY / block_bytes).min(num_blocks)),
            max_prefill_tokens: args.max_prefill_tokens,
            prefix_sharing: !args.no_prefix_sharing,
            max_num_seqs: EngineConfig::new(format, num_blocks).max_num_seqs.max(args.batch),
            ..EngineConfig::new(format, num_blocks)
        };
        let swap_bytes = engine.swap_blocks.saturating_mul(block_bytes);
        check_memory(&CpuBackend::new(), "the host's part of the cache", swap_bytes, "fewer --swap-blocks")?;
        Ok(Plan {
            scales,
            scale_source,
            engine,
            block_bytes,
            bytes_per_token: spec.bytes_per_token()? * layers,
            bytes_per_token_auto: auto.bytes_per_token()? * layers,
        })
    }
}

impl<B: Compute<A> + Machine, A: Element> Session<B, A> {
    /// Blocks that all prompts of `--prompt-length` and their samples take at their longest.
    fn blocks_for_random_prompts(&self, args: &Args, spec: &CacheSpec) -> Result<usize, Failure> {
        if args.prompt_length.is_none() {
            return Ok(0);
        }
        let positions = self.model.config().max_position_embeddings;
        let blocks = |request: Request| {
            let tokens = request.prompt.len().saturating_add(request.max_tokens).min(positions);
            // One more: samples copy the block they share.
            request.n.saturating_mul(spec.blocks_for_tokens(tokens) + 1)
        };
        Ok(self.requests(args)?.into_iter().map(blocks).fold(0, usize::saturating_add))
    }
}

/// Whether prompts are given as tokens.
fn has_ids(args: &Args) -> bool {
    !args.prompt_ids.is_empty() || args.prompt_length.is_some()
}

/// What the user can do about scales that were refused.
fn explain_scales(error: quantkv::Error) -> Failure {
    let advice = match &error {
        quantkv::Error::MissingScales { .. } => " (see --missing-kv-scales one)",
        quantkv::Error::InvalidScale { .. } => " (see --calculate-kv-scales, --scales-file)",
        _ => "",
    };
    Failure::User(format!("{error}{advice}"))
}

/// What the user can do about a request that was refused.
pub fn explain(number: usize, of: usize, error: quantkv::Error) -> Failure {
    let which = if of > 1 { format!("prompt {}: ", number + 1) } else { String::new() };
    let text = error.to_string();
    let advice = if text.contains("the cache has") { " (see --kv-memory, --num-blocks, --max-tokens)" } else { "" };
    Failure::User(format!("{which}{text}{advice}"))
}

fn read_lines(path: &Path) -> Result<Vec<String>, Failure> {
    let failed = |error: std::io::Error| Failure::User(format!("{}: {error}", path.display()));
    let mut text = String::new();
    let file = std::fs::File::open(path).map_err(failed)?;
    file.take(MAX_PROMPTS_FILE).read_to_string(&mut text).map_err(failed)?;
    if text.len() as u64 == MAX_PROMPTS_FILE {
        return Err(Failure::User(format!("{} is larger than {MAX_PROMPTS_FILE} bytes", path.display())));
    }
    // Some editors begin a file with a byte order mark.
    let text = text.strip_prefix('\u{feff}').unwrap_or(&text);
    let lines: Vec<String> = text.lines().filter(|line| !line.trim().is_empty()).map(str::to_owned).collect();
    match lines.is_empty() {
        true => Err(Failure::User(format!("{} has no prompts, one is expected a line", path.display()))),
        false => Ok(lines),
    }
}

/// Refuses what the machine cannot hold, where it says how much it can: allocating it may succeed, and
/// using it end the process.
fn check_memory(machine: &impl Machine, what: &str, bytes: usize, instead: &str) -> Result<(), Failure> {
    match machine.free_memory() {
        Some(free) if bytes > free => {
            let label = machine.label();
            Err(Failure::User(format!("{what} would take {bytes} bytes, {label} has {free} to give: use {instead}")))
        }
        _ => Ok(()),
    }
}
