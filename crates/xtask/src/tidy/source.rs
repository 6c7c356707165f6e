//! A Rust source with comments and literals blanked out, cut into identifiers.
//!
//! Enough to find functions and keywords without a parser: the compiler has already accepted
//! the file, so only what looks like code but is not (comments, strings, characters) matters.

/// Source text in which every comment and literal is spaces. Line breaks are kept.
#[derive(Debug)]
pub(crate) struct Source {
    code: String,
}

/// An identifier or keyword.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Token<'a> {
    /// The word.
    pub(crate) text: &'a str,
    /// The line it is on, from 1.
    pub(crate) line: usize,
    /// Where it ends, in bytes into [`Source::code`].
    pub(crate) end: usize,
}

impl Source {
    /// Blanks `text`.
    pub(crate) fn new(text: &str) -> Self {
        Self { code: blank(text) }
    }

    /// The code, with the same lines as the file.
    pub(crate) fn code(&self) -> &str {
        &self.code
    }

    /// All identifiers and keywords, in order.
    pub(crate) fn tokens(&self) -> impl Iterator<Item = Token<'_>> {
        let mut rest = 0;
        let mut line = 1;
        std::iter::from_fn(move || {
            let code = self.code.as_bytes();
            while rest < code.len() && !is_word(code[rest]) {
                line += usize::from(code[rest] == b'\n');
                rest += 1;
            }
            let start = rest;
            while rest < code.len() && is_word(code[rest]) {
                rest += 1;
            }
            (start < rest).then(|| Token { text: &self.code[start..rest], line, end: rest })
        })
    }

    /// Whether the next thing after `token`, spaces apart, is `expected`.
    pub(crate) fn follows(&self, token: &Token<'_>, expected: char) -> bool {
        self.code[token.end..].trim_start().starts_with(expected)
    }
}

fn is_word(byte: u8) -> bool {
    byte.is_ascii_alphanumeric() || byte == b'_' || byte >= 0x80
}

/// What the scanner is in the middle of.
enum State {
    Code,
    LineComment,
    BlockComment { depth: usize },
    Text { raw_hashes: Option<usize> },
    Character,
}

fn blank(text: &str) -> String {
    let bytes = text.as_bytes();
    let mut out = Vec::with_capacity(bytes.len());
    let mut state = State::Code;
    let mut at = 0;
    while at < bytes.len() {
        let (next, width) = match &state {
            State::Code => start_of_literal(bytes, at),
            State::LineComment => {
                if bytes[at] == b'\n' {
                    (Some(State::Code), 1)
                } else {
                    (None, 1)
                }
            }
            State::BlockComment { depth } => step_block_comment(&bytes[at..], *depth),
            State::Text { raw_hashes } => step_text(&bytes[at..], *raw_hashes),
            State::Character => match bytes[at] {
                b'\\' => (None, 2),
                b'\'' => (Some(State::Code), 1),
                _ => (None, 1),
            },
        };
        let stays_code = matches!(state, State::Code) && next.is_none();
        for &byte in &bytes[at..bytes.len().min(at + width)] {
            out.push(if stays_code || byte == b'\n' { byte } else { b' ' });
        }
        at += width;
        if let Some(next) = next {
            state = next;
        }
    }
    String::from_utf8_lossy(&out).into_owned()
}

/// At code: the literal or comment that starts here, and how many bytes open it.
fn start_of_literal(bytes: &[u8], at: usize) -> (Option<State>, usize) {
    let rest = &bytes[at..];
    let in_word = at > 0 && is_word(bytes[at - 1]);
    match rest {
        [b'/', b'/', ..] => (Some(State::LineComment), 2),
        [b'/', b'*', ..] => (Some(State::BlockComment { depth: 1 }), 2),
        [b'"', ..] => (Some(State::Text { raw_hashes: None }), 1),
        [b'b' | b'c', b'"', ..] if !in_word => (Some(State::Text { raw_hashes: None }), 2),
        [b'r', ..] if !in_word => raw_text(rest, 1),
        [b'b' | b'c', b'r', ..] if !in_word => raw_text(rest, 2),
        // 'x' and '\n' are characters; 'a without a closing quote is a lifetime.
        [b'\'', b'\\', ..] => (Some(State::Character), 1),
        [b'\'', first, ..] => {
            let closes_at = 1 + utf8_width(*first);
            let is_character = rest.get(closes_at) == Some(&b'\'');
            (is_character.then_some(State::Character), 1)
        }
        _ => (None, 1),
    }
}

fn raw_text(rest: &[u8], prefix: usize) -> (Option<State>, usize) {
    let hashes = rest[prefix..].iter().take_while(|&&byte| byte == b'#').count();
    if rest.get(prefix + hashes) == Some(&b'"') {
        (Some(State::Text { raw_hashes: Some(hashes) }), prefix + hashes + 1)
    } else {
        (None, 1)
    }
}

fn step_block_comment(rest: &[u8], depth: usize) -> (Option<State>, usize) {
    match rest {
        [b'/', b'*', ..] => (Some(State::BlockComment { depth: depth + 1 }), 2),
        [b'*', b'/', ..] if depth == 1 => (Some(State::Code), 2),
        [b'*', b'/', ..] => (Some(State::BlockComment { depth: depth - 1 }), 2),
        _ => (None, 1),
    }
}

fn step_text(rest: &[u8], raw_hashes: Option<usize>) -> (Option<State>, usize) {
    match (rest[0], raw_hashes) {
        (b'\\', None) => (None, 2),
        (b'"', None) => (Some(State::Code), 1),
        (b'"', Some(hashes)) => {
            let closing = rest[1..].iter().take(hashes).filter(|&&byte| byte == b'#').count();
            if closing == hashes { (Some(State::Code), 1 + hashes) } else { (None, 1) }
        }
        _ => (None, 1),
    }
}

fn utf8_width(first: u8) -> usize {
    match first {
        0xF0.. => 4,
        0xE0.. => 3,
        0xC0.. => 2,
        _ => 1,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn words(text: &str) -> Vec<String> {
        Source::new(text).tokens().map(|token| token.text.to_owned()).collect()
    }

    #[test]
    fn literals_and_comments_are_not_code() {
        let cases: &[(&str, &[&str])] = &[
            ("a // b\nc", &["a", "c"]),
            ("a /* b /* c */ d */ e", &["a", "e"]),
            (r#"a "b \" c" d"#, &["a", "d"]),
            (r##"a r#"b " c"# d"##, &["a", "d"]),
            (r#"a br"b" c"#, &["a", "c"]),
            (r#"a b"b" c"c" d"#, &["a", "d"]),
            ("a '\"' b '{' c", &["a", "b", "c"]),
            (r"a '\'' b '\\' c", &["a", "b", "c"]),
            ("fn f<'a>(x: &'a str)", &["fn", "f", "a", "x", "a", "str"]),
            ("for r in x", &["for", "r", "in", "x"]),
            ("a 'é' b", &["a", "b"]),
            ("a \"b\nc\" d", &["a", "d"]),
        ];
        for (text, expected) in cases {
            assert_eq!(words(text), *expected, "{text}");
        }
    }

    #[test]
    fn lines_survive_blanking() {
        let text = "/* one\ntwo */ three\n\"four\nfive\" six";
        let source = Source::new(text);
        let lines: Vec<usize> = source.tokens().map(|token| token.line).collect();
        assert_eq!(lines, [2, 4]);
        assert_eq!(source.code().lines().count(), text.lines().count());
    }
}
