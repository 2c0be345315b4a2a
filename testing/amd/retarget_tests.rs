use super::*;

#[test]
fn address_spaces_go() {
    assert_eq!(
        without_address_spaces("  %1 = alloca [4 x float], align 16, addrspace(5)"),
        "  %1 = alloca [4 x float], align 16"
    );
    assert_eq!(
        without_address_spaces(
            "  store i32 0, ptr addrspace(3) getelementptr (i8, ptr addrspace(3) @x, i32 4), align 4"
        ),
        "  store i32 0, ptr getelementptr (i8, ptr @x, i32 4), align 4"
    );
    assert_eq!(
        without_address_spaces(
            "call void @llvm.memcpy.p5.p4.i64(ptr addrspace(5) %1, ptr addrspace(4) %2, i64 8, i1 0)"
        ),
        "call void @llvm.memcpy.p0.p0.i64(ptr %1, ptr %2, i64 8, i1 0)"
    );
    assert_eq!(
        without_address_spaces("%2 = addrspacecast ptr addrspace(3) %1 to ptr"),
        "%2 = bitcast ptr %1 to ptr"
    );
}

#[test]
fn each_call_that_lanes_make_together_has_its_number() {
    let mut calls = 7;
    let call = intrinsics("%1 = tail call i32 @llvm.amdgcn.ds.bpermute(i32 %a, i32 %b) #4", &mut calls);
    assert_eq!(call.unwrap(), "%1 = tail call i32 @amd_ds_bpermute(i32 7, i32 %a, i32 %b) #4");
    let call = intrinsics("tail call void @llvm.amdgcn.s.barrier()", &mut calls);
    assert_eq!(call.unwrap(), "tail call void @amd_s_barrier(i32 8)");
    let declaration = intrinsics("declare i32 @llvm.amdgcn.ds.bpermute(i32, i32) #3", &mut calls);
    assert_eq!(declaration.unwrap(), "declare i32 @amd_ds_bpermute(i32, i32, i32) #3");
    assert_eq!(calls, 9);
}

#[test]
fn products_pass_through_memory() {
    let line = "  %7 = tail call <4 x float> @llvm.amdgcn.mfma.f32.16x16x16f16(<4 x half> %1, <4 x half> %2, \
                <4 x float> zeroinitializer, i32 0, i32 0, i32 0)";
    let mut calls = 3;
    let out = product(line, &mut calls).unwrap();
    assert_eq!(calls, 4);
    assert!(out[0].contains("store <4 x half> %1, ptr"), "{out:?}");
    assert_eq!(out[3], "  call void @amd_product(i32 3, i32 4, i1 false)");
    assert!(out[4].starts_with("  %7 = load <4 x float>, ptr"), "{out:?}");
    let line = "  %7 = tail call <8 x float> @llvm.amdgcn.wmma.f32.16x16x16.bf16.v8f32.v16i16(<16 x i16> %1, \
                <16 x i16> %2, <8 x float> %3)";
    assert_eq!(product(line, &mut calls).unwrap()[3], "  call void @amd_product(i32 4, i32 16, i1 true)");
    for unknown in [
        "  %7 = call <4 x float> @llvm.amdgcn.mfma.f32.16x16x16f16(<4 x half> %1, <4 x half> %2, <4 x float> %3, i32 1, i32 0, i32 0)",
        "  %7 = call <4 x float> @llvm.amdgcn.mfma.f32.32x32x8f16(<4 x half> %1, <4 x half> %2, <4 x float> %3, i32 0, i32 0, i32 0)",
    ] {
        assert!(product(unknown, &mut calls).is_err(), "{unknown}");
    }
}

#[test]
fn what_is_not_known_is_refused() {
    let said = intrinsics("%1 = call i32 @llvm.amdgcn.ds.swizzle(i32 %a, i32 5)", &mut 0).unwrap_err();
    assert!(said.contains("ds.swizzle"), "{said}");
    assert!(retarget("define i32 @f() #0 {\n", "gfx942").unwrap_err().contains("was not inlined"));
    let other = "define amdgpu_kernel void @k() #0 {\nattributes #0 = { \"target-cpu\"=\"gfx90a\" }\n";
    assert!(retarget(other, "gfx942").unwrap_err().contains("not code for gfx942"));
    let number = "%1 = ptrtoint ptr addrspace(3) @x to i32";
    assert!(retarget(number, "gfx942").unwrap_err().contains("as a number"));
}

#[test]
fn kernels_become_functions_with_thunks() {
    let line = "define amdgpu_kernel void @k(ptr nocapture noundef readonly byref(%\"struct.a(b, c)\") align 8 %0, \
                i32 noundef %1) local_unnamed_addr #0 comdat {";
    let (kernel, definition) = kernel_definition(line).unwrap();
    assert_eq!(kernel.parameters, [("%\"struct.a(b, c)\"".to_owned(), true), ("i32".to_owned(), false)]);
    assert_eq!(
        definition,
        "define void @k(ptr nocapture noundef readonly  align 8 %0, i32 noundef %1) #0 comdat {"
    );
}

#[test]
fn shared_memory_is_listed_with_the_kernels_that_use_it() {
    let text = "@a = internal addrspace(3) global [4 x float] undef, align 16\n\
                @b = internal addrspace(3) global [2 x i32] poison, align 16\n\
                @d = external addrspace(3) global [0 x i8], align 128\n\
                define amdgpu_kernel void @first() #0 {\n  store i32 0, ptr addrspace(3) @b, align 4\n}\n\
                define amdgpu_kernel void @second() #0 {\n  store i32 0, ptr addrspace(3) @d, align 4\n}\n\
                attributes #0 = { convergent nounwind memory(none) \"target-cpu\"=\"gfx942\" }\n";
    let out = retarget(text, "gfx942").unwrap();
    let lines: Vec<&str> = out.lines().collect();
    assert!(lines.contains(&"@a = internal global [4 x float] zeroinitializer, align 128"));
    assert!(lines.contains(&"  store i32 0, ptr @amd_dynamic_shared, align 4"));
    assert!(lines.contains(&"attributes #0 = { convergent nounwind }"));
    let shared: Vec<&&str> = lines.iter().filter(|line| line.starts_with("@amd.shared.")).collect();
    assert!(shared[0].contains("[1 x { ptr, i64 }]") && shared[0].contains("ptr @b,"));
    assert!(shared[1].contains("[0 x { ptr, i64 }]"));
    assert!(lines.iter().any(|line| line.starts_with("@amd.kernels")
        && line.contains("i32 0 }, %amd.kernel")
        && line.contains("i32 1 }")));
}
