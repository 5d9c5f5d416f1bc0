//! Where the process can have no thread more, a start ends in words.

use crate::harness::process::{config_file, ended, with_threads};

#[tokio::test]
async fn a_start_that_cannot_have_its_threads_says_so_and_ends() {
    let config = config_file("listen: \"127.0.0.1:0\"\nadmin: \"127.0.0.1:0\"\nworker_threads: 2\n");
    for (threads, missing) in [
        (1, "2 worker threads: "),
        (2, "2 worker threads: "),
        (3, "admin thread: "),
    ] {
        let mut command = with_threads(threads);
        command.arg("--config").arg(config.path());
        let ended = ended(command).await;
        assert_eq!(ended.code, 1, "{threads}: {}", ended.stderr);
        let missing = format!("crun-gateway: {missing}");
        let said = ended.stderr.lines().find(|line| line.starts_with(&missing));
        let is_why = said.is_some_and(|line| line.contains("Resource temporarily unavailable"));
        assert!(is_why, "{threads}: {}", ended.stderr);
    }
}
