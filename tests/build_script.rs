//! The parts of build.rs that decide: architecture lists, nvcc's answers, dependency files.
//! What a user sees when the toolchain is wrong is tested by scripts/check_cuda_build.sh.

#[allow(dead_code)]
#[path = "../build/archs.rs"]
mod archs;
#[allow(dead_code)]
#[path = "../build/environment.rs"]
mod environment;
#[allow(dead_code)]
#[path = "../build/toolkit.rs"]
mod toolkit;

use archs::{Arch, DEFAULT, DEFAULT_UP_TO_90, choose};

const NVCC_13_0: &[u32] = &[75, 80, 86, 87, 88, 89, 90, 100, 103, 110, 120, 121];
const NVCC_12_4: &[u32] = &[50, 52, 53, 60, 61, 62, 70, 72, 75, 80, 86, 87, 89, 90];

fn names(archs: &[Arch]) -> Vec<String> {
    archs.iter().map(Arch::to_string).collect()
}

#[test]
fn the_default_is_what_this_nvcc_knows_of_it() {
    let newest = choose(None, None, NVCC_13_0).unwrap();
    assert_eq!(names(&newest).join(" "), DEFAULT);
    let older = choose(None, None, NVCC_12_4).unwrap();
    assert_eq!(names(&older).join(" "), DEFAULT_UP_TO_90);
}

#[test]
fn a_list_is_taken_as_it_is() {
    for list in ["80,90a", "90a 80", "sm_80;sm_90a", "8.0, 9.0a", "80,80,90a"] {
        assert_eq!(names(&choose(Some(list), Some("120"), NVCC_13_0).unwrap()), ["80", "90a"], "{list}");
    }
    assert_eq!(names(&choose(Some("compute_80 90"), None, NVCC_13_0).unwrap()), ["90", "compute_80"]);
    assert_eq!(names(&choose(Some("120f"), None, NVCC_13_0).unwrap()), ["120f"]);
}

#[test]
fn one_device_is_asked_for_with_its_own_instructions() {
    for (capability, arch) in
        [("75", "75"), ("8.9", "89"), ("90", "90a"), ("9.0", "90a"), ("90a", "90a"), ("120", "120a"), ("12.0", "120a")]
    {
        assert_eq!(names(&choose(None, Some(capability), NVCC_13_0).unwrap()), [arch], "{capability}");
    }
}

#[test]
fn an_unknown_architecture_is_named_with_the_known_ones() {
    for word in ["37", "70", "999", "a", "sm_", "9.0.0", "90b", "-80", "+80", "compute_", "8.", "99999999999"] {
        let message = choose(Some(word), None, NVCC_13_0).unwrap_err();
        assert!(message.contains(&format!("'{word}'")) && message.contains("75 80 86"), "{message}");
        let message = choose(None, Some(word), NVCC_13_0).unwrap_err();
        assert!(message.contains("CUDA_COMPUTE_CAP"), "{message}");
    }
    assert!(choose(Some(" , "), None, NVCC_13_0).is_err());
}

#[test]
fn flags_name_the_virtual_and_the_real_architecture() {
    let flags = |list: &str| archs::flags(&choose(Some(list), None, NVCC_13_0).unwrap()).join(" ");
    let gencode = |of: &str, codes: &str| format!("-gencode=arch=compute_{of},code=[{codes}]");
    assert_eq!(flags("90a compute_80"), [gencode("90a", "sm_90a"), gencode("80", "compute_80")].join(" "));
    // From sm_100 on one pass of the compiler's first half serves all, but for an architecture's own instructions.
    assert_eq!(flags(DEFAULT), {
        let [a, b, c, d] = ["75", "80", "89", "90a"].map(|own| gencode(own, &format!("sm_{own}")));
        [a, b, c, d, gencode("100", "sm_100,sm_120,compute_100")].join(" ")
    });
    assert_eq!(flags("120 compute_100"), gencode("100", "sm_120,compute_100"));
    assert_eq!(flags("100 compute_120"), [gencode("100", "sm_100"), gencode("120", "compute_120")].join(" "));
    assert_eq!(flags("100a 120"), [gencode("100a", "sm_100a"), gencode("120", "sm_120")].join(" "));
}

#[test]
fn kernels_overlap_only_where_every_image_waits() {
    for (list, old) in [("90a", false), ("80 90a compute_90", false), ("80 compute_80", true), ("75", false)] {
        assert_eq!(archs::newer_devices_run_older_code(&choose(Some(list), None, NVCC_13_0).unwrap()), old, "{list}");
    }
}

#[test]
fn kernels_of_hopper_are_taken_only_where_their_code_is() {
    let lists = [
        ("90a", true),
        ("80 90a compute_90", true),
        ("90", false),
        ("90 90a", false),
        ("80 compute_90", false),
        ("75", false),
    ];
    for (list, has) in lists {
        assert_eq!(archs::devices_90_run_90a(&choose(Some(list), None, NVCC_13_0).unwrap()), has, "{list}");
    }
}

#[test]
fn what_nvcc_says_of_itself() {
    let text = "nvcc: NVIDIA (R) Cuda compiler driver\nCopyright (c) 2005-2024 NVIDIA Corporation\n\
                Built on Thu_Mar_28_02:18:24_PDT_2024\nCuda compilation tools, release 12.4, V12.4.131\n\
                Build cuda_12.4.r12.4/compiler.34097967_0\n";
    assert_eq!(toolkit::parse_version(text), Some((12, 4)));
    assert_eq!(toolkit::parse_version(&text.replace("12.4", "9.0")), Some((9, 0)));
    for text in ["", "release", "release twelve, V", "clang version 19.1.7"] {
        assert_eq!(toolkit::parse_version(text), None, "{text}");
    }
    assert_eq!(toolkit::parse_archs("compute_80\ncompute_75\r\ncompute_80\ncompute_90a\n\n"), [75, 80]);
}
