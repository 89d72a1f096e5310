# SPDX-License-Identifier: Apache-2.0
# What the GPU tests need beyond a program each: stand-ins for driver libraries, found by one test only.
set(fake ${CMAKE_CURRENT_BINARY_DIR}/fake_drivers)
foreach(lib "fake_hip amdhip64 7" "fake_cuda cuda 1")
    separate_arguments(lib)
    list(GET lib 0 source)
    list(GET lib 1 name)
    list(GET lib 2 version)
    add_library(${source} SHARED ${CMAKE_CURRENT_LIST_DIR}/${source}.c)
    set_target_properties(${source} PROPERTIES OUTPUT_NAME ${name} SOVERSION ${version} LIBRARY_OUTPUT_DIRECTORY ${fake})
    add_dependencies(test_gpu_driver ${source})
endforeach()
set_tests_properties(test_gpu_driver PROPERTIES ENVIRONMENT "LD_LIBRARY_PATH=${fake}")
