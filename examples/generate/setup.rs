//! From flags and a model folder to requests and an engine's sizes.

use std::io::Read;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use quantkv::decoder::chat::{ChatTemplate, Message};
use quantkv::decoder::engine::Request;
use quantkv::decoder::kv_scales::{KvScales, ScaleSource, resolve};
use quantkv::decoder::sampling::SamplingParams;
use quantkv::decoder::tokenizer::Tokenizer;
use quantkv::decoder::{EngineConfig, GenerationConfig, Model};
use quantkv::{CpuBackend, KvCacheDtype};

use crate::Failure;
use crate::args::Args;

/// The bundled model, and a prompt it can answer.
const BUNDLED: &str = "models/tales-3m";
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

/// What is loaded once.
pub struct Session {
    pub model_dir: PathBuf,
    pub model: Model<CpuBackend>,
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
    pub block_bytes: usize,
    /// Bytes a token takes in all layers, in this cache and in one of the model's own dtype.
    pub bytes_per_token: usize,
    pub bytes_per_token_auto: usize,
}

impl Session {
    pub fn load(args: &Args) -> Result<Session, Failure> {
        let model_dir = match &args.model {
            Some(dir) => dir.clone(),
            None => bundled_model()?,
        };
        let model = Model::load(&model_dir, Arc::new(CpuBackend::new()))?;
        let generation = GenerationConfig::from_dir(&model_dir)?;
        let tokenizer = match model_dir.join("tokenizer.json").exists() {
            // Token ids alone need none.
            false if !args.prompt_ids.is_empty() => None,
            _ => Some(Arc::new(Tokenizer::from_model_dir(&model_dir)?)),
        };
        let mut session = Session { model_dir, model, tokenizer, prompts: Vec::new(), generation, notes: Vec::new() };
        session.prompts = session.read_prompts(args)?;
        if session.sampling(args).is_greedy() {
            let given = [
                ("--top-p", args.top_p.is_some()),
                ("--top-k", args.top_k.is_some()),
                ("--min-p", args.min_p.is_some()),
            ];
            for (flag, _) in given.iter().filter(|(_, given)| *given) {
                session.notes.push(format!("{flag} has no effect at temperature 0"));
            }
        }
        Ok(session)
    }

    fn read_prompts(&self, args: &Args) -> Result<Vec<Prompt>, Failure> {
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
        let Some(tokenizer) = &self.tokenizer else { return Ok(Vec::new()) };
        if !args.chat {
            return texts.into_iter().map(|text| Ok(Prompt { ids: tokenizer.encode(&text, true)?, text })).collect();
        }
        let Some(template) = ChatTemplate::from_model_dir(&self.model_dir)? else {
            let dir = self.model_dir.display();
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
            eos_token_ids: if args.ignore_eos { Vec::new() } else { eos.clone() },
        };
        Ok(self.prompts.iter().map(request).collect())
    }

    /// Sizes and scales of a cache of `dtype`.
    pub fn plan(&self, args: &Args, dtype: KvCacheDtype) -> Result<Plan, Failure> {
        let (model, layers) = (&self.model, self.model.config().num_layers);
        let format = dtype.resolve(model.dtype());
        let spec = model.cache_spec(args.block_size, format)?;
        let auto = model.cache_spec(args.block_size, KvCacheDtype::Auto.resolve(model.dtype()))?;
        let num_blocks = match args.num_blocks {
            Some(blocks) => blocks,
            None => spec.blocks_for_budget(layers, args.kv_memory.unwrap_or(DEFAULT_KV_MEMORY))?,
        };
        let block_bytes = spec.bytes_per_block()?.saturating_mul(layers);
        check_memory(num_blocks.saturating_mul(block_bytes))?;
        let source = match &args.scales_file {
            Some(path) => ScaleSource::File(path),
            None if args.calculate_kv_scales => ScaleSource::FirstBatch,
            None => ScaleSource::Checkpoint,
        };
        let engine = EngineConfig {
            block_size: args.block_size,
            swap_blocks: args.swap_blocks.unwrap_or((DEFAULT_SWAP_MEMORY / block_bytes).min(num_blocks)),
            max_prefill_tokens: args.max_prefill_tokens,
            prefix_sharing: !args.no_prefix_sharing,
            ..EngineConfig::new(format, num_blocks)
        };
        check_memory(engine.swap_blocks.saturating_mul(block_bytes))?;
        Ok(Plan {
            scales: resolve(model.config(), model.weights(), format, source)?,
            engine,
            block_bytes,
            bytes_per_token: spec.bytes_per_token()? * layers,
            bytes_per_token_auto: auto.bytes_per_token()? * layers,
        })
    }
}

/// What the user can do about a request that was refused.
pub fn explain(number: usize, of: usize, error: quantkv::Error) -> Failure {
    let which = if of > 1 { format!("prompt {}: ", number + 1) } else { String::new() };
    let text = error.to_string();
    let advice = if text.contains("the cache has") { " (see --kv-memory, --num-blocks, --max-tokens)" } else { "" };
    Failure::User(format!("{which}{text}{advice}"))
}

/// The bundled model beside the sources this program was built from, or in the current folder.
fn bundled_model() -> Result<PathBuf, Failure> {
    let sources = Path::new(env!("CARGO_MANIFEST_DIR")).join(BUNDLED);
    let found = [sources.clone(), PathBuf::from(BUNDLED)].into_iter().find(|dir| dir.join("config.json").exists());
    found.ok_or_else(|| {
        Failure::User(format!(
            "the bundled model is neither at {} nor at ./{BUNDLED}: it is in the source repository of quantkv, \
             not in the published package; copy it from there or give --model DIR",
            sources.display()
        ))
    })
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

/// Refuses a pool that the machine cannot hold, where it says how much it can: allocating it would
/// succeed, and using it end the process.
fn check_memory(bytes: usize) -> Result<(), Failure> {
    let Ok(meminfo) = std::fs::read_to_string("/proc/meminfo") else { return Ok(()) };
    let available = meminfo.lines().find_map(|line| {
        let kib = line.strip_prefix("MemAvailable:")?.trim().strip_suffix("kB")?.trim();
        kib.parse::<usize>().ok()?.checked_mul(1024)
    });
    match available {
        Some(available) if bytes > available => Err(Failure::User(format!(
            "the cache would take {bytes} bytes, this machine has {available} to give: use a smaller --kv-memory, \
             --num-blocks or --swap-blocks"
        ))),
        _ => Ok(()),
    }
}
