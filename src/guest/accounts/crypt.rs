//! Password hashes.

/// Accepts the hashes of crypt(5) that are still sound: SHA-512 (`$6$`), SHA-256 (`$5$`), yescrypt (`$y$`), bcrypt (`$2b$`), each with its exact
/// shape. Everything else, cleartext first of all, is refused; the message never repeats the value.
pub fn check_crypt_hash(hash: &str) -> Result<(), String> {
    const SHAPES: &str = "give a crypt(5) hash of the form $6$…, $5$…, $y$… or $2b$…, e.g. from \"mkpasswd -m yescrypt\" or \"openssl passwd -6\"";
    let alphabet = |text: &str| text.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'.' || b == b'/');
    let fields: Vec<&str> = hash.split('$').collect();
    let sha = |salt: &str, digest: &str, len: usize| (1..=16).contains(&salt.len()) && alphabet(salt) && digest.len() == len && alphabet(digest);
    let sha_len = |kind: &str| if kind == "6" { 86 } else { 43 };
    let right = match fields[..] {
        ["", kind @ ("6" | "5"), salt, digest] => sha(salt, digest, sha_len(kind)),
        ["", kind @ ("6" | "5"), rounds, salt, digest] => {
            let count = rounds.strip_prefix("rounds=").and_then(|count| count.parse::<u32>().ok());
            count.is_some_and(|count| (1000..=999_999_999).contains(&count)) && sha(salt, digest, sha_len(kind))
        }
        ["", "y", params, salt, digest] => {
            (1..=16).contains(&params.len())
                && alphabet(params)
                && (1..=86).contains(&salt.len())
                && alphabet(salt)
                && digest.len() == 43
                && alphabet(digest)
        }
        ["", "2b", cost, rest] => {
            cost.len() == 2 && cost.parse::<u8>().is_ok_and(|cost| (4..=31).contains(&cost)) && rest.len() == 53 && alphabet(rest)
        }
        _ => false,
    };
    if right { Ok(()) } else { Err(format!("is not a crypt(5) hash ({} characters); {SHAPES}", hash.chars().count())) }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SHA512: &str = "$6$saltsalt$qFmFH.bQmmtXzyBY0s9v7Oicd2z4XSIecDzlB5KiA2/jctKu9YterLp8wwnSq.qc.eoxqOmSuNp2xS0ktL3nh/";

    #[test]
    fn only_sound_crypt_hashes_are_accepted_and_the_value_is_not_repeated() {
        let yescrypt = format!("$y$j9T$F5Jx5fExrKuPp53xLKQ..1${}", "a".repeat(43));
        let bcrypt = format!("$2b$12${}", "a".repeat(53));
        let rounds = SHA512.replace("$6$", "$6$rounds=5000$");
        for good in [SHA512, &yescrypt, &bcrypt, &rounds] {
            assert_eq!(check_crypt_hash(good), Ok(()), "{good}");
        }
        let bad = ["", "hunter2", "*", "!", "x", "$1$abc$0123456789012345678901", "$6$salt$short", "$6$sa:lt$", "$2b$99$", "$6$"];
        for bad in bad {
            assert!(check_crypt_hash(bad).is_err_and(|message| bad.len() < 4 || !message.contains(bad)), "{bad}");
        }
        for tail in ["\n", ":", "\r", "\0", "é"] {
            assert!(check_crypt_hash(&format!("{SHA512}{tail}")).is_err(), "{tail:?}");
        }
    }
}
