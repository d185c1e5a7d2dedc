//! Other people's tools: GnuPG and minisign, each with a home of its own, and age.

use std::{
    fs,
    io::Write,
    os::unix::fs::PermissionsExt,
    path::{Path, PathBuf},
    process::{Command, Stdio},
};

use tempfile::TempDir;

use crate::common::server::judge;

/// GnuPG with a key ring of its own. The agent ends with it.
pub struct Gpg {
    home: TempDir,
}

impl Gpg {
    /// An empty one.
    #[track_caller]
    pub fn new() -> Gpg {
        // The agent's socket is in it: the path has to be short.
        let home = tempfile::Builder::new().prefix("gpg").tempdir_in("/tmp").expect("make a temporary directory");
        std::fs::write(home.path().join("gpg-agent.conf"), "allow-loopback-pinentry\n").expect("write its configuration");
        Gpg { home }
    }

    /// Runs gpg and gives its output.
    #[track_caller]
    pub fn run(&self, arguments: &[&str], input: &[u8]) -> Vec<u8> {
        let mut command = Command::new("gpg");
        command.arg("--homedir").arg(self.home.path()).args([
            "--batch",
            "--yes",
            "--quiet",
            "--no-tty",
            "--pinentry-mode",
            "loopback",
            "--passphrase",
            "",
        ]);
        // Weak keys are made on purpose.
        command.args(["--enable-large-rsa", "--trust-model", "always"]).args(arguments);
        let mut child = command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().expect("start gpg (Debian: gnupg)");
        let mut stdin = child.stdin.take().expect("was asked for");
        let input = input.to_vec();
        // A pipe holds less than some of the documents.
        let feed = std::thread::spawn(move || stdin.write_all(&input));
        let output = child.wait_with_output().expect("wait for gpg");
        feed.join().expect("no panic").expect("gpg reads its input");
        assert!(output.status.success(), "gpg {arguments:?}: {}", String::from_utf8_lossy(&output.stderr));
        output.stdout
    }

    /// Makes a key with the user id `name`; `expires` is 0 or as gpg takes it.
    #[track_caller]
    pub fn make_key(&self, name: &str, algorithm: &str, usage: &str, expires: &str) {
        self.run(&["--quick-generate-key", name, algorithm, usage, expires], b"");
    }

    /// Adds a subkey.
    #[track_caller]
    pub fn add_subkey(&self, name: &str, algorithm: &str, usage: &str, expires: &str) {
        self.run(&["--quick-add-key", &self.fingerprint(name), algorithm, usage, expires], b"");
    }

    /// The primary key's fingerprint.
    #[track_caller]
    pub fn fingerprint(&self, name: &str) -> String {
        let listing = String::from_utf8(self.run(&["--with-colons", "--list-keys", name], b"")).expect("text");
        let line = listing.lines().find(|line| line.starts_with("fpr:")).expect("a key has a fingerprint");
        line.split(':').nth(9).expect("the tenth field").to_owned()
    }

    /// The certificates, binary.
    #[track_caller]
    pub fn export(&self, names: &[&str]) -> Vec<u8> {
        self.run(&[&["--export"], names].concat(), b"")
    }

    /// A detached signature.
    #[track_caller]
    pub fn sign(&self, name: &str, bytes: &[u8], options: &[&str]) -> Vec<u8> {
        self.run(&[&["--local-user", name], options, &["--detach-sign", "--output", "-"]].concat(), bytes)
    }

    /// A clear-signed document.
    #[track_caller]
    pub fn clearsign(&self, name: &str, bytes: &[u8], options: &[&str]) -> Vec<u8> {
        self.run(&[&["--local-user", name], options, &["--clearsign", "--output", "-"]].concat(), bytes)
    }

    /// What gpg itself finds signed in a document.
    #[track_caller]
    pub fn verified_text(&self, document: &[u8]) -> String {
        String::from_utf8(self.run(&["--decrypt", "--output", "-"], document)).expect("text")
    }

    /// Revokes a key by the certificate that gpg made with it.
    #[track_caller]
    pub fn revoke(&self, name: &str) {
        let path = self.home.path().join("openpgp-revocs.d").join(format!("{}.rev", self.fingerprint(name)));
        // gpg puts a colon before the armor against use by mistake.
        let certificate = std::fs::read_to_string(path).expect("gpg made one").replace(":-----BEGIN", "-----BEGIN");
        self.run(&["--import"], certificate.as_bytes());
    }
}

impl Drop for Gpg {
    fn drop(&mut self) {
        let _ended = Command::new("gpgconf").arg("--homedir").arg(self.home.path()).args(["--kill", "all"]).status();
    }
}

/// minisign with a key of its own.
pub struct Minisign {
    home: TempDir,
}

impl Minisign {
    /// Makes the key, without a password.
    #[track_caller]
    pub fn new() -> Minisign {
        let minisign = Minisign { home: tempfile::tempdir().expect("make a temporary directory") };
        let secret = minisign.home.path().join("key.sec");
        minisign.run(&["-G", "-W", "-p", minisign.public_key().to_str().expect("text"), "-s", secret.to_str().expect("text")]);
        minisign
    }

    #[track_caller]
    fn run(&self, arguments: &[&str]) {
        let output = Command::new("minisign").args(arguments).stdin(Stdio::null()).output().expect("start minisign (Debian: minisign)");
        assert!(output.status.success(), "minisign {arguments:?}: {}", String::from_utf8_lossy(&output.stderr));
    }

    /// The file of the public key.
    pub fn public_key(&self) -> PathBuf {
        self.home.path().join("key.pub")
    }

    /// Its id, as the file's comment has it.
    #[track_caller]
    pub fn key_id(&self) -> String {
        let text = std::fs::read_to_string(self.public_key()).expect("read the public key");
        let comment = text.lines().next().expect("a comment");
        format!("{:0>16}", comment.rsplit(' ').next().expect("the id is its last word"))
    }

    /// Signs a file into `FILE.minisig`, and gives that.
    #[track_caller]
    pub fn sign(&self, file: &Path, options: &[&str]) -> Vec<u8> {
        let secret = self.home.path().join("key.sec");
        let path = file.to_str().expect("text");
        self.run(&[options, &["-S", "-s", secret.to_str().expect("text"), "-m", path]].concat());
        std::fs::read(format!("{path}.minisig")).expect("minisign wrote it")
    }
}

/// Makes an identity; its file, and the recipient.
pub fn identity(dir: &Path, name: &str) -> (PathBuf, String) {
    let path = dir.join(name);
    judge("age-keygen", &["-o", path.to_str().expect("text")]);
    let text = fs::read_to_string(&path).expect("written");
    let recipient = text.lines().find_map(|line| line.strip_prefix("# public key: ")).expect("age-keygen says it").to_owned();
    fs::set_permissions(&path, fs::Permissions::from_mode(0o600)).expect("chmod");
    (path, recipient)
}

/// Encrypts a file beside itself.
pub fn encrypt(path: &Path, options: &[&str]) -> PathBuf {
    let to = path.with_extension("age");
    judge("age", &[options, &["-o", to.to_str().expect("text"), path.to_str().expect("text")]].concat());
    to
}
