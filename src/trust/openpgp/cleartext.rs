//! The cleartext signature framework (RFC 9580 section 7), in linear time and without leeway.
//!
//! ```text
//!  -----BEGIN PGP SIGNED MESSAGE-----
//!  Hash: SHA512                        any number, nothing but Hash
//!
//!  text, lines that start with "-" escaped by "- "
//!  -----BEGIN PGP SIGNATURE-----
//!  …                                   armor
//!  -----END PGP SIGNATURE-----
//! ```
//!
//! Signed are the lines without white space at their ends, joined by CR LF, without a line end at the end. Anything before, after or between is refused:
//! readers that skip it show text that nobody signed.

/// A document taken apart.
#[derive(Debug)]
pub(super) struct Parts<'a> {
    /// The bytes that the signature is over.
    pub signed: Vec<u8>,
    /// The same for people and programs: each line ended by LF.
    pub payload: Vec<u8>,
    /// The armored signature.
    pub signature: &'a [u8],
}

const BEGIN_MESSAGE: &[u8] = b"-----BEGIN PGP SIGNED MESSAGE-----";
const BEGIN_SIGNATURE: &[u8] = b"-----BEGIN PGP SIGNATURE-----";
const END_SIGNATURE: &[u8] = b"-----END PGP SIGNATURE-----";

/// Takes a clear-signed document apart; says what is wrong with one that isn't.
pub(super) fn split(bytes: &[u8]) -> Result<Parts<'_>, String> {
    let mut lines = Lines { bytes, at: 0 };
    if lines.next().map(|line| line.text) != Some(BEGIN_MESSAGE) {
        return Err("is not a clear-signed document: it does not start with BEGIN PGP SIGNED MESSAGE".into());
    }
    loop {
        let line = lines.next().ok_or("ends within its headers")?;
        if line.text.is_empty() {
            break;
        }
        let is_hash =
            line.text.strip_prefix(b"Hash: ").is_some_and(|names| names.iter().all(|byte| byte.is_ascii_alphanumeric() || b"-, ".contains(byte)));
        if !is_hash {
            return Err("has a header other than Hash".into());
        }
    }
    let (mut signed, mut payload) = (Vec::with_capacity(bytes.len()), Vec::with_capacity(bytes.len()));
    let mut first = true;
    let start = loop {
        let line = lines.next().ok_or("has no signature")?;
        if line.text == BEGIN_SIGNATURE {
            break line.start;
        }
        let text = match line.text {
            [b'-', b' ', text @ ..] => text,
            [b'-', ..] => return Err("has a line that starts with a dash and is not escaped".into()),
            text => text,
        };
        if text.contains(&b'\r') {
            return Err("has a carriage return within a line".into());
        }
        if !std::mem::take(&mut first) {
            signed.extend_from_slice(b"\r\n");
        }
        signed.extend_from_slice(text);
        payload.extend_from_slice(text);
        payload.push(b'\n');
    };
    Ok(Parts { signed, payload, signature: &bytes[start..] })
}

/// The one armored signature that `bytes` are, `None` when they have no armor. An error when there is something around it.
pub(super) fn armored_signature(bytes: &[u8]) -> Result<Option<&[u8]>, &'static str> {
    let mut lines = Lines { bytes, at: 0 };
    if lines.next().map(|line| line.text) != Some(BEGIN_SIGNATURE) {
        // Packets have bit 7 set in their first byte, text has not.
        return if bytes.first().is_some_and(|first| first & 0x80 != 0) { Ok(None) } else { Err("is not a signature") };
    }
    loop {
        match lines.next() {
            None => return Err("the signature has no end"),
            Some(line) if line.text == END_SIGNATURE => break,
            Some(_) => {}
        }
    }
    let block = &bytes[..lines.at];
    if bytes[lines.at..].iter().any(|byte| !byte.is_ascii_whitespace()) {
        return Err("has something after its signature");
    }
    Ok(Some(block))
}

struct Line<'a> {
    /// Where it starts.
    start: usize,
    /// Without white space at its end.
    text: &'a [u8],
}

struct Lines<'a> {
    bytes: &'a [u8],
    at: usize,
}

impl<'a> Iterator for Lines<'a> {
    type Item = Line<'a>;

    fn next(&mut self) -> Option<Line<'a>> {
        let rest = self.bytes.get(self.at..).filter(|rest| !rest.is_empty())?;
        let start = self.at;
        let len = rest.iter().position(|byte| *byte == b'\n').unwrap_or(rest.len());
        self.at += (len + 1).min(rest.len());
        let text = &rest[..len];
        let end = text.iter().rposition(|byte| !matches!(byte, b' ' | b'\t' | b'\r')).map_or(0, |last| last + 1);
        Some(Line { start, text: &text[..end] })
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn document(text: &str) -> Vec<u8> {
        format!("-----BEGIN PGP SIGNED MESSAGE-----\nHash: SHA512\n\n{text}-----BEGIN PGP SIGNATURE-----\n\nabcd\n-----END PGP SIGNATURE-----\n")
            .into_bytes()
    }

    #[test]
    fn signed_and_shown_text_are_the_same_lines() {
        let bytes = document("one \t\r\n- - two\n\n  three\n");
        let parts = split(&bytes).expect("well formed");
        assert_eq!(parts.signed, b"one\r\n- two\r\n\r\n  three");
        assert_eq!(parts.payload, b"one\n- two\n\n  three\n");
        assert_eq!(armored_signature(parts.signature), Ok(Some(&b"-----BEGIN PGP SIGNATURE-----\n\nabcd\n-----END PGP SIGNATURE-----\n"[..])));
    }

    #[test]
    fn whatever_a_lenient_reader_would_skip_is_refused() {
        let good = String::from_utf8(document("x\n")).expect("text");
        for (what, bytes) in [
            ("text before", format!("hello\n{good}")),
            ("an empty line before", format!("\n{good}")),
            ("another header", good.replace("Hash: SHA512", "Hash: SHA512\nComment: x")),
            ("a hidden header", good.replace("Hash: SHA512", "Hash: SHA512\u{b}x")),
            ("no end of headers", good.replace("\n\nx", "\nx")),
            ("an unescaped dash", good.replace("\nx\n", "\n-x\n")),
            ("a second message", good.replace("\nx\n", "\nx\n-----BEGIN PGP SIGNED MESSAGE-----\n")),
            ("a carriage return", good.replace("\nx\n", "\nx\ry\n")),
            ("no signature", good.replace("BEGIN PGP SIGNATURE", "BEGIN")),
            ("nothing", String::new()),
        ] {
            assert!(split(bytes.as_bytes()).is_err(), "{what}");
        }
        for (what, bytes) in
            [("text after", format!("{good}more\n")), ("a second document", format!("{good}{good}")), ("no end", good.replace("END PGP", "END"))]
        {
            let parts = split(bytes.as_bytes()).expect("the text is well formed");
            assert!(armored_signature(parts.signature).is_err(), "{what}");
        }
    }

    proptest! {
        #[test]
        fn any_text_without_carriage_returns_comes_back(lines in prop::collection::vec("[ -~]{0,20}", 0..20)) {
            let escaped: String = lines.iter().map(|line| if line.starts_with('-') { format!("- {line}\n") } else { format!("{line}\n") }).collect();
            let bytes = document(&escaped);
            let parts = split(&bytes).expect("well formed");
            let want: String = lines.iter().map(|line| format!("{}\n", line.trim_end_matches([' ', '\t']))).collect();
            prop_assert_eq!(String::from_utf8(parts.payload).expect("text"), want);
        }

        #[test]
        fn no_bytes_make_it_panic(bytes in prop::collection::vec(any::<u8>(), 0..300), text in ".{0,100}") {
            let _ = split(&bytes).map(|parts| armored_signature(parts.signature).is_ok());
            let _ = split(&document(&text)).map(|parts| armored_signature(parts.signature).is_ok());
        }
    }
}
