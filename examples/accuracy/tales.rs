//! Tales: short texts that state facts early and ask for them at the end. `scripts/tales.py` in Rust,
//! with the same words, sentences and questions; only the generator of random numbers is another, so the
//! same seed tells other tales.

use rand::rngs::ChaCha12Rng;
use rand::{Rng, SeedableRng};

pub const NAMES: &str = "Mia Tom Ana Leo Eva Sam Nora Max Ida Ben Lily Paul Rosa Finn Clara Hugo Ella Oscar Ruth Theo";
pub const THINGS: &str = "key coin ring map letter shell button lamp flute stone feather book candle spoon rope bell";
pub const MATERIALS: &str = "brass silver wooden glass paper red blue green old tiny golden heavy";
pub const PLACES: &str = "box drawer basket tower boat garden cellar barn cave kitchen well attic chapel mill stable";
pub const PLACE_ADJECTIVES: &str = "round dark warm narrow quiet tall hidden sunny dusty cold";
pub const FOODS: &str = "bread soup apples cake rice plums cheese pears";
pub const WEATHERS: &str = "cold soft strong mild loud gentle";
pub const ANIMAL_ADJECTIVES: &str = "small grey white happy tired proud";
pub const VERBS: [&str; 3] = ["is", "was left", "lies hidden"];

pub const FACT: &str = "{name}'s {material} {thing} {verb} in the {adjective} {place}.";
pub const QUESTION: &str = "Where is {name}'s {thing}?";
pub const FILLERS: [&str; 9] = [
    "The wind was {weather} that day.",
    "{An} {animal} bird sang near the {place}.",
    "They ate {food} and talked about the {place}.",
    "It was {weather} outside, so {name} stayed near the {place}.",
    "{name} counted to {number} and laughed.",
    "Later, {name} saw {an} {animal} cat by the {place}.",
    "The bell rang {number} times.",
    "{name} and {other} walked to the {place} and back.",
    "Nobody knew why the {animal} dog slept by the {place}.",
];

/// Facts one tale can have: each has a thing of its own.
pub const MAX_FACTS: usize = 16;

/// A tale, its questions and their answers.
pub struct Tale {
    pub text: String,
    /// (question, answer), in no particular order.
    pub questions: Vec<(String, String)>,
}

impl Tale {
    /// The text with all questions and answers: what the bundled model was trained on.
    pub fn document(&self) -> String {
        let questions = self.questions.iter().map(|(question, answer)| format!(" {question} {answer}"));
        self.text.clone() + &questions.collect::<String>() + "\n"
    }

    /// The text with its first question, and the answer.
    pub fn recall_case(&self) -> (String, &str) {
        let (question, answer) = &self.questions[0];
        (format!("{} {question}", self.text), answer)
    }
}

/// Whether a continuation of a recall case begins with the answer, word for word.
pub fn recalls(continuation: &str, answer: &str) -> bool {
    let sentence = continuation.split_inclusive('.').next().unwrap_or_default();
    sentence.strip_prefix(' ') == Some(answer)
}

/// Tells tales. The same seed and stream tell the same ones.
pub struct Teller(ChaCha12Rng);

impl Teller {
    pub fn new(seed: u64, stream: u64) -> Self {
        let mut generator = ChaCha12Rng::seed_from_u64(seed);
        generator.set_stream(stream);
        Teller(generator)
    }

    /// A tale of `facts` facts (1 to [`MAX_FACTS`]) and `fillers` sentences that state none.
    pub fn tale(&mut self, facts: usize, fillers: usize) -> Tale {
        let mut things: Vec<&str> = THINGS.split(' ').collect();
        self.shuffle(&mut things);
        let mut questions = Vec::new();
        for thing in &things[..facts.clamp(1, MAX_FACTS)] {
            let words = [
                ("name", self.word(NAMES)),
                ("material", self.word(MATERIALS)),
                ("thing", thing),
                ("verb", VERBS[self.below(VERBS.len())]),
                ("adjective", self.word(PLACE_ADJECTIVES)),
                ("place", self.word(PLACES)),
            ];
            questions.push((fill(QUESTION, &words), fill(FACT, &words)));
        }
        let mut sentences: Vec<String> = questions.iter().map(|(_, fact)| fact.clone()).collect();
        for _ in 0..fillers {
            let place = self.below(sentences.len() + 1);
            let filler = self.filler();
            sentences.insert(place, filler);
        }
        self.shuffle(&mut questions);
        Tale { text: sentences.join(" "), questions }
    }

    /// A sentence that states no fact.
    fn filler(&mut self) -> String {
        let animal = self.word(ANIMAL_ADJECTIVES);
        let vowel = animal.starts_with(['a', 'e', 'i', 'o', 'u']);
        let name = self.word(NAMES);
        let other = loop {
            let other = self.word(NAMES);
            if other != name {
                break other;
            }
        };
        let words = [
            ("weather", self.word(WEATHERS)),
            ("animal", animal),
            ("an", if vowel { "an" } else { "a" }),
            ("An", if vowel { "An" } else { "A" }),
            ("place", self.word(PLACES)),
            ("food", self.word(FOODS)),
            ("name", name),
            ("other", other),
            ("number", &(2 + self.below(18)).to_string()),
        ];
        fill(FILLERS[self.below(FILLERS.len())], &words)
    }

    fn word(&mut self, words: &'static str) -> &'static str {
        let words: Vec<&str> = words.split(' ').collect();
        words[self.below(words.len())]
    }

    fn shuffle<T>(&mut self, items: &mut [T]) {
        for last in (1..items.len()).rev() {
            items.swap(last, self.below(last + 1));
        }
    }

    /// A number below `bound`. (The bias of a remainder is below 2^-58 here.)
    fn below(&mut self, bound: usize) -> usize {
        (self.0.next_u64() % bound as u64) as usize
    }
}

/// `template` with each `{key}` replaced by its word.
fn fill(template: &str, words: &[(&str, &str)]) -> String {
    words.iter().fold(template.to_owned(), |text, (key, word)| text.replace(&format!("{{{key}}}"), word))
}
