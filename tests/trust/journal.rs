//! A catalogue that somebody has written to: what the journal says is not believed further than its types go.

use std::fs;

use crate::common::server::{self, Daemon, judge};
use cloudletd::proto;
use rusqlite::{Connection, params};

#[tokio::test(flavor = "multi_thread")]
async fn tampered_rows_of_the_journal_are_left_alone_and_nothing_outside_is_touched() {
    let home = tempfile::tempdir().expect("a directory");
    let home = fs::canonicalize(home.path()).expect("there");
    let mut daemon = Daemon::start_in(&home, |_| ()).await;
    let image = daemon.image().await;
    daemon.render("a", server::spec(&image, "web1", proto::VolumeFormat::Raw)).await;
    daemon.stop().await;
    let outside = home.join("outside");
    fs::write(&outside, "precious").expect("written");
    let (volume, blobs) = (home.join("pool/web1.raw"), home.join("state/blobs"));
    let before = (fs::read(&volume).expect("there"), fs::read_dir(&blobs).expect("there").count());
    let intent =
        |pool: &str, name: &str, format: &str| format!(r#"{{"intents":[{{"pool":"{pool}","name":"{name}","format":"{format}"}}],"sealed":null}}"#);
    let rows = [
        ("render", "rnd-1", "{".to_owned()),
        ("render", "rnd-2", "[]".to_owned()),
        // Another render's volume, and what no volume can be called.
        ("render", "rnd-3", intent("default", "web1", "raw")),
        ("render", "rnd-4", intent("default", "../outside", "raw")),
        ("render", "rnd-5", intent("../..", "outside", "raw")),
        ("render", "rnd-6", intent("default", "web1", "floppy")),
        ("render", "rnd-7", intent("elsewhere", "web1", "raw")),
        ("remove-volume", "default/../../outside", "{}".to_owned()),
        ("remove-volume", "web1", "{}".to_owned()),
        ("remove-volume", "elsewhere/web1", "{}".to_owned()),
        ("remove-blob", "../../outside", "{}".to_owned()),
        ("remove-blob", "sha256:", "{}".to_owned()),
        ("remove-golden", "../../../outside", "{}".to_owned()),
        ("nonsense", "x", "{}".to_owned()),
    ];
    let database = Connection::open(home.join("state/catalog.sqlite")).expect("the catalogue");
    for (what, subject, detail) in &rows {
        let sql = "INSERT INTO journal (what, subject, detail, since) VALUES (?1, ?2, ?3, 0)";
        database.execute(sql, params![what, subject, detail]).expect("tampered");
    }
    drop(database);

    let mut daemon = Daemon::start_in(&home, |_| ()).await;
    assert_eq!(fs::read_to_string(&outside).expect("still there"), "precious");
    assert!(before == (fs::read(&volume).expect("still there"), fs::read_dir(&blobs).expect("there").count()));
    daemon.render("b", server::spec(&image, "web2", proto::VolumeFormat::Raw)).await;
    judge("e2fsck", &["-fn", &daemon.dir.join("pool/web2.raw").display().to_string()]);
    assert_eq!(daemon.mapping("web1").await.mapping.expect("a mapping").instance, "web1");
    daemon.stop().await;
    let database = Connection::open(home.join("state/catalog.sqlite")).expect("the catalogue");
    let left: i64 = database.query_row("SELECT count(*) FROM journal WHERE subject LIKE '%outside%'", [], |row| row.get(0)).expect("a number");
    assert!(left >= 3, "what can't be read stays for somebody to look at: {left}");
}
