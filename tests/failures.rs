//! How others failed, and what keeps us from it: each class of failure that the peers' advisories and issue threads tell of is a named test here, or a sentence
//! that says why it can't occur. That the tests are there is checked; that they pass is their own affair.

use std::{fs, path::Path};

/// What stands against a class of failure.
enum Against {
    /// These tests.
    Tests(&'static [&'static str]),
    /// These tests, and something that is not there to fail.
    Both(&'static [&'static str], &'static str),
}

use Against::{Both, Tests};

/// Class, where it happened, what stands against it here.
const FAILURES: [(&str, &str, Against); 32] = [
    (
        "injected path with .. or absolute elsewhere",
        "Nova CVE-2012-3360 and -3361, Incus CVE-2026-23954",
        Tests(&["guest_paths_are_normalised_and_cannot_climb", "paths_that_must_not_be_written_are_refused"]),
    ),
    (
        "symlink in the image redirects a host write",
        "Nova CVE-2012-3447, Incus, ignite",
        Both(
            &["two_writers_of_one_file_and_symlinks_are_refused", "resolv_conf_follows_its_policy"],
            "ext4 trees are data of this process and are never walked by the host; xfs and btrfs are written beneath a root descriptor in a child",
        ),
    ),
    (
        "duplicate archive members",
        "Incus CVE-2026-48749",
        Tests(&["the_last_member_of_a_name_wins", "the_last_member_wins_but_never_over_a_full_directory_or_through_a_link"]),
    ),
    (
        "chroot as a sandbox runs guest code",
        "vzctl 7efefc3",
        Both(
            &["a_user_of_the_image_is_changed_and_keeps_what_is_not_named"],
            "nothing calls chroot; users are read from the tree's own files, never by NSS",
        ),
    ),
    (
        "the kernel parses a hostile filesystem",
        "Ganeti design-os, guestfs",
        Both(
            &[
                "nothing_shows_in_the_hosts_mount_table_and_an_abandoned_build_leaves_nothing",
                "a_guests_filesystem_is_read_by_a_process_that_can_do_nothing_else",
            ],
            "only filesystems that mkfs made here a moment ago are mounted; volumes of guests are read and changed by our own ext4 code",
        ),
    ),
    (
        "boot-loader parser in dom0",
        "XSA-198, XSA-443, XSA-497",
        Both(&["what_grub_gives_a_meaning_is_quoted_in_command_lines_and_refused_in_paths"], "no code of ours parses a guest's boot configuration"),
    ),
    (
        "image format probing, backing and data files",
        "CVE-2010-3851, 2015-5162, 2022-47951, 2024-32498",
        Both(
            &[
                "libvirt_states_every_format_and_escapes_paths",
                "an_overlay_says_its_backing_format_and_writes_little",
                "features_that_are_not_handled_are_refused_by_name",
            ],
            "inputs are tarballs; disk images are only made, with their format declared everywhere",
        ),
    ),
    ("uploader lies about the format", "Nova LP#2071734", Tests(&["bytes_that_are_not_what_the_manifest_declares_are_refused_and_leave_nothing"])),
    (
        "digest checked after a transformation, or not at all",
        "Ironic CVE-2024-47211, Incus CVE-2026-33542",
        Tests(&["a_resumed_file_has_the_digest_of_all_of_it", "holes_and_written_zeros_have_the_same_digest_and_every_byte_counts"]),
    ),
    (
        "a name or digest from the server used as a file name",
        "Incus CVE-2026-48769 and -81500",
        Tests(&["digests_are_lower_case_hex_only", "ids_follow_from_both_digests_and_are_never_paths"]),
    ),
    (
        "cross-tenant reuse of the cache",
        "Incus CVE-2026-81501",
        Both(
            &["the_differing_field_is_named", "bytes_that_are_in_the_store_already_are_not_trusted_for_it"],
            "what a render may use follows from its image; that a tarball or golden is here answers no request",
        ),
    ),
    (
        "SSRF: probe before policy, redirects, DNS rebinding, file://",
        "Incus -35527, Glance OSSA-2026-004, Ironic OSSA-2025-001",
        Tests(&[
            "schemes_hosts_ports_and_credentials_are_checked",
            "redirects_are_followed_checked_and_counted",
            "a_name_that_leads_to_a_denied_address_gets_no_packet",
            "ranges_can_be_allowed_and_denied_and_denial_wins",
        ]),
    ),
    (
        "unbounded documents",
        "Incus -41648",
        Tests(&["size_and_depth_are_limited", "size_depth_and_encoding_are_limited", "a_hostile_template_runs_into_limits"]),
    ),
    (
        "newline or control characters into generated configuration",
        "Incus -23953, GHSA-7fj9",
        Tests(&[
            "no_field_lets_a_control_character_through",
            "control_characters_never_get_into_a_file",
            "values_never_leave_their_quotes_and_control_characters_never_get_in",
        ]),
    ),
    ("template engine with I/O or code", "Incus -33897", Tests(&["a_hostile_template_runs_into_limits", "output_is_not_expanded_again"])),
    (
        "fixed in one driver, not in its twin",
        "Incus GHSA-4qxq",
        Both(&["every_file_format_holds_golden_and_patch_and_passes_the_check"], "all targets take the same golden and the same patch"),
    ),
    (
        "decompression, sparse-map and entry-count bombs",
        "many",
        Tests(&["bombs_stop_at_the_ratio_or_at_the_total", "bombs_and_oddities_are_refused", "limits_are_kept"]),
    ),
    (
        "PAX and ustar disagreement smuggles files",
        "RUSTSEC-2025-0111, -2026-0112, -2026-0068",
        Tests(&[
            "members_that_readers_disagree_about_are_refused",
            "archives_of_gnu_tar_in_every_format_are_read_alike",
            "global_headers_may_not_rename_or_resize_members",
        ]),
    ),
    (
        "weak modes on secrets",
        "CVE-2012-2690",
        Tests(&["every_path_has_the_mode_and_owner_that_the_table_says", "a_world_readable_shadow_is_narrowed_and_an_inline_password_moves"]),
    ),
    (
        "host data leaks into the guest",
        "instance-debootstrap",
        Both(
            &["hosts_keeps_every_other_line_and_its_order", "resolv_conf_follows_its_policy"],
            "injection is a pure function of request, image and golden",
        ),
    ),
    ("cleared or default passwords", "instance-debootstrap", Tests(&["only_sound_crypt_hashes_are_accepted_and_the_value_is_not_repeated"])),
    (
        "secrets in logs, jobs, state",
        "Ganeti, cloud-init CVE-2023-1786",
        Tests(&[
            "secrets_are_in_the_guest_only_and_never_in_report_debug_or_record",
            "secrets_are_known_and_never_shown",
            "secrets_mark_the_edit_and_stay_out_of_errors",
            "identities_are_the_daemons_alone_and_are_never_shown",
        ]),
    ),
    (
        "the previous tenant's blocks visible",
        "CDI, Incus, coldsnap #395",
        Tests(&[
            "a_used_device_holds_golden_and_patch_and_nothing_of_the_previous_tenant",
            "every_zero_policy_leaves_nothing_of_the_previous_tenant_but_keep_beyond_the_volume",
        ]),
    ),
    (
        "success before durable",
        "Nova 1301368bf2",
        Tests(&["two_hundred_kills_leave_volumes_complete_or_absent_and_every_retry_gives_the_right_answer"]),
    ),
    (
        "HTTP 200 with the wrong body",
        "CDI #1502",
        Tests(&["sizes_are_limited_before_and_during_the_transfer", "a_good_server_is_fetched_from_with_and_without_digest"]),
    ),
    (
        "leaked and raced loop devices",
        "ignite #39, Ganeti #1093, osbuild, armbian",
        Tests(&[
            "eight_threads_attach_and_close_25_times_each_without_a_failure_or_a_leak",
            "killing_worker_or_daemon_leaves_no_loop_device_and_no_process",
            "two_hundred_kills_leave_volumes_complete_or_absent_and_every_retry_gives_the_right_answer",
        ]),
    ),
    (
        "the wrong device overwritten",
        "armbian #10003",
        Tests(&[
            "a_name_outside_the_allow_list_is_never_opened",
            "a_device_in_use_is_refused_whoever_uses_it",
            "the_identity_is_pinned_and_another_device_under_the_name_is_never_touched",
            "a_device_that_is_too_small_is_refused_untouched",
        ]),
    ),
    (
        "retry storms, no timeouts",
        "coldsnap #437, flintlock #161",
        Tests(&["stalls_are_cut_and_resumed", "a_full_queue_refuses_with_retry_info", "cancelling_ends_a_stalled_transfer_soon"]),
    ),
    (
        "cloned identity",
        "cloud-init #3268 and #3611",
        Tests(&[
            "the_same_inputs_give_the_same_identity_and_others_differ",
            "leftovers_of_the_build_machine_are_removed_with_a_reason",
            "a_new_uuid_and_label_reach_every_copy_and_every_checksum",
        ]),
    ),
    (
        "existing configuration shadows the injected one",
        "cloud-init #4121",
        Tests(&[
            "dhcp_profiles_of_the_image_for_the_same_device_go_and_others_stay",
            "a_claimed_back_end_file_leaves_the_whole_network_to_the_template",
        ]),
    ),
    (
        "silent downgrade from signed to unsigned",
        "juju, installimage",
        Both(
            &[
                "without_a_good_signature_nothing_is_taken_and_nothing_is_left",
                "what_is_in_the_store_from_before_the_rule_is_not_exempt",
                "a_peer_that_has_the_golden_image_does_not_vouch_for_it",
                "an_image_of_a_stream_owes_what_its_url_owes_and_its_manifest_is_the_streams",
                "a_manifest_owes_its_signature_before_it_is_parsed",
                "an_uploaded_tarball_brings_its_signature_or_is_refused",
                "no_spelling_of_a_url_steps_around_its_rule",
                "trees_that_are_tampered_with_stale_unsigned_oversized_or_escaping_are_refused",
                "digests_are_lower_case_hex_only",
            ],
            "a rule that requires a signature has no fallback, and `updated` of a stream never goes backwards",
        ),
    ),
    (
        "leaked snapshots, partial volumes, stale goldens",
        "fireactions, lxd #2207",
        Tests(&[
            "what_volumes_files_and_leases_refer_to_stays_and_the_rest_goes_and_comes_back",
            "what_others_left_is_named_and_only_what_is_proven_ours_goes",
            "collecting_while_rendering_never_takes_a_golden_from_under_a_volume",
        ]),
    ),
];

fn collect(directory: &Path, into: &mut String) {
    for entry in fs::read_dir(directory).expect("read a directory of sources") {
        let path = entry.expect("an entry").path();
        if path.is_dir() {
            collect(&path, into);
        } else if path.extension().is_some_and(|extension| extension == "rs") && !path.ends_with("tests/failures.rs") {
            into.push_str(&fs::read_to_string(&path).expect("read a source"));
        }
    }
}

#[test]
fn every_class_of_failure_has_a_test_that_exists_or_a_reason() {
    let (root, mut sources) = (Path::new(env!("CARGO_MANIFEST_DIR")), String::new());
    collect(&root.join("src"), &mut sources);
    collect(&root.join("tests"), &mut sources);
    let mut missing = Vec::new();
    for (class, seen_at, against) in &FAILURES {
        assert!(!class.is_empty() && !seen_at.is_empty());
        let tests = match against {
            Tests(tests) => tests,
            Both(tests, why) => {
                assert!(!why.is_empty(), "{class}");
                tests
            }
        };
        assert!(!tests.is_empty(), "{class}: nothing is named");
        missing.extend(tests.iter().filter(|name| !sources.contains(&format!("fn {name}("))).map(|name| format!("{class}: {name}")));
    }
    assert!(missing.is_empty(), "tests that are not there: {missing:#?}");
}
