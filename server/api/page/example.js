// A long text with one fact in it, and a question for that fact: what a cache must not forget.

const PEOPLE = ["baker", "sailor", "hunter", "farmer", "teacher", "doctor", "singer", "mason"];
const VERBS = ["serves", "pulls", "follows", "sells", "reads", "visits", "plays", "builds"];
const THINGS = ["soup", "boat", "path", "horse", "letter", "friend", "song", "tower"];
const PLACES = [
  "in the kitchen", "by the sea", "on the hill", "at the market",
  "in the library", "at the door", "on the stage", "in the village",
];
const NAMES = ["Alice", "Bruno", "Clara", "David", "Elena", "Frank", "Greta", "Henry"];
const WORDS_PER_SENTENCE = 8;
const MOST_WORDS = 2400;

/**
 * Writes a prompt that fills about a third of the context, at most 2400 words.
 *
 * @param {number} maxModelLen tokens of the context
 */
export function longExample(maxModelLen) {
  const words = Math.min(maxModelLen / 3, MOST_WORDS);
  const size = Math.max(2, Math.floor(words / WORDS_PER_SENTENCE));
  const sentences = Array.from({ length: size }, sentence);
  const name = pick(NAMES);
  const code = 1000 + Math.floor(Math.random() * 9000);
  // Early in the text, where a window of recent tokens has long moved on.
  const place = Math.floor(size * (0.15 + 0.35 * Math.random()));
  sentences.splice(place, 0, `The access code ${name} ${code}.`);
  return `${sentences.join(" ")}\nWhat is the access code ${name}?`;
}

function sentence() {
  return `The ${pick(PEOPLE)} ${pick(VERBS)} the ${pick(THINGS)} ${pick(PLACES)}.`;
}

function pick(choices) {
  return choices[Math.floor(Math.random() * choices.length)];
}
