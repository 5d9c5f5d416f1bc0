//! Answers of upstream's.

use std::sync::LazyLock;

/// What is sung about.
const WORDS: [&str; 32] = [
    "again", "alone", "and", "burning", "city", "dance", "dark", "down", "ever", "falling", "fire", "heart", "home",
    "I", "into", "light", "love", "midnight", "moon", "never", "night", "of", "rain", "river", "shadow", "silence",
    "slow", "summer", "the", "tonight", "under", "you",
];

/// As much as the longest answer needs; the same in every run (xorshift32).
static LYRICS: LazyLock<String> = LazyLock::new(|| {
    let mut state = 2_463_534_242_u32;
    let mut lyrics = String::new();
    while lyrics.len() < 6 << 20 {
        state ^= state << 13;
        state ^= state >> 17;
        state ^= state << 5;
        lyrics.push_str(WORDS[(state >> 27) as usize]);
        lyrics.push(' ');
    }
    lyrics
});

/// The answer to a task that has ended, `size` bytes long: two tracks with the same lyrics, as upstream's songs have.
pub fn body(id: &str, size: usize) -> Vec<u8> {
    let around = |lyrics: &str, rest: &str| {
        format!(
            r#"{{"code":200,"message":"success","data":{{"task_id":"{id}","status":"success","result":{{"suno_data":[{{"suno_audio_url":"https://media.example/{id}-1.mp3","duration":181.4,"prompt":"{lyrics}"}},{{"suno_audio_url":"https://media.example/{id}-2.mp3","duration":182.4,"prompt":"{lyrics}"}}]}},"source":"api{rest}"}}}}"#
        )
    };
    let room = size - around("", "").len();
    around(&LYRICS[..room / 2], &"s"[..room % 2]).into_bytes()
}
