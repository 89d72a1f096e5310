# SPDX-License-Identifier: Apache-2.0
# What the GPU tests need beyond a program each: stand-ins for driver libraries, found by two tests only.
set(fake ${CMAKE_CURRENT_BINARY_DIR}/fake_drivers)
foreach(lib "fake_hip amdhip64 7" "fake_cuda cuda 1")
    separate_arguments(lib)
    list(GET lib 0 source)
    list(GET lib 1 name)
    list(GET lib 2 version)
    add_library(${source} SHARED ${CMAKE_CURRENT_LIST_DIR}/${source}.c)
    set_target_properties(${source} PROPERTIES OUTPUT_NAME ${name} SOVERSION ${version} LIBRARY_OUTPUT_DIRECTORY ${fake})
    add_dependencies(test_gpu_driver ${source})
    add_dependencies(test_gpu_device ${source})
endforeach()
set_tests_properties(test_gpu_driver test_gpu_device PROPERTIES ENVIRONMENT "LD_LIBRARY_PATH=${fake}")

# One that computes, in the emulation: for whole processes (tests/e2e/test_device.py).
if(TARGET td_emu)
    add_library(fake_hip_emulated SHARED ${CMAKE_CURRENT_LIST_DIR}/fake_hip_emulated.c)
    target_link_libraries(fake_hip_emulated PRIVATE td_emu)
    set_target_properties(fake_hip_emulated PROPERTIES OUTPUT_NAME amdhip64 SOVERSION 7 LINKER_LANGUAGE C
        LIBRARY_OUTPUT_DIRECTORY ${CMAKE_CURRENT_BINARY_DIR}/fake_emulated)
endif()

# The GPU backend in the emulation: the kernel tests once more (test_kernels_X as emu_kernels_X), and tests of its own.
if(TARGET td_emu)
    foreach(t kernels_attend kernels_draw kernels_gemm kernels_index kernels_kv kernels_moe kernels_share ahead kv ops scaled selftest tune engine)
        set(source ${CMAKE_CURRENT_LIST_DIR}/emu_${t}.c)
        if(NOT EXISTS ${source})
            set(source ${CMAKE_CURRENT_LIST_DIR}/test_${t}.c)
        endif()
        add_executable(emu_${t} ${source})
        target_compile_definitions(emu_${t} PRIVATE TD_TEST_EMU TD_SOURCE_DIR="${CMAKE_SOURCE_DIR}")
        target_link_libraries(emu_${t} PRIVATE td_emu td_engine td_kernels td_base PkgConfig::CMOCKA)
        set_target_properties(emu_${t} PROPERTIES LINKER_LANGUAGE C)
        add_test(NAME emu_${t} COMMAND emu_${t})
        set_tests_properties(emu_${t} PROPERTIES LABELS kernels TIMEOUT 600)
    endforeach()
endif()

find_program(TD_PYTHON NAMES python3 PATHS /usr/bin NO_DEFAULT_PATH)
# Machine code of the kernels. 77 = skipped, with the reason printed.
add_test(NAME test_code_objects COMMAND ${TD_PYTHON} -B ${CMAKE_SOURCE_DIR}/tests/static/test_code_objects.py)
set_tests_properties(test_code_objects PROPERTIES LABELS static TIMEOUT 600 SKIP_RETURN_CODE 77
    ENVIRONMENT "TD_SOURCE_DIR=${CMAKE_SOURCE_DIR};TD_BINARY_DIR=${CMAKE_BINARY_DIR}")
add_test(NAME test_paper_figures COMMAND ${TD_PYTHON} -B ${CMAKE_SOURCE_DIR}/tests/static/test_paper_figures.py)
set_tests_properties(test_paper_figures PROPERTIES LABELS static TIMEOUT 300 SKIP_RETURN_CODE 77 DEPENDS test_code_objects
    ENVIRONMENT "TD_SOURCE_DIR=${CMAKE_SOURCE_DIR};TD_BINARY_DIR=${CMAKE_BINARY_DIR}")
