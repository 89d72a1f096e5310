# SPDX-License-Identifier: Apache-2.0
set(CMAKE_C_STANDARD 17)
set(CMAKE_C_STANDARD_REQUIRED ON)
set(CMAKE_C_EXTENSIONS ON)
set(CMAKE_EXPORT_COMPILE_COMMANDS ON)
set(CMAKE_POSITION_INDEPENDENT_CODE ON)

if(NOT CMAKE_BUILD_TYPE)
    set(CMAKE_BUILD_TYPE Release)
endif()
option(TD_WERROR "Treat warnings as errors" OFF)
set(TD_SANITIZE "" CACHE STRING "Sanitizers, e.g. address,undefined or thread")
option(TD_FUZZ "Build the fuzz targets with libFuzzer (clang)" OFF)

add_compile_definitions(_GNU_SOURCE)
add_compile_options(
    -march=x86-64-v2 -ffp-contract=off -fno-math-errno -fno-strict-aliasing
    -Wall -Wextra -Wshadow -Wstrict-prototypes -Wmissing-prototypes -Wpointer-arith -Wvla
    -Wformat=2 -Wimplicit-fallthrough -Wno-unused-parameter -Wno-missing-field-initializers
    -fstack-protector-strong -fstack-clash-protection -fcf-protection=full
    -ffile-prefix-map=${CMAKE_SOURCE_DIR}=.)
if(TD_WERROR)
    add_compile_options(-Werror)
endif()
set(CMAKE_C_FLAGS_RELEASE "-O2 -g1")
set(CMAKE_C_FLAGS_DEBUG "-O1 -g")
if(TD_SANITIZE)
    add_compile_options(-fsanitize=${TD_SANITIZE} -fno-omit-frame-pointer -fno-sanitize-recover=undefined)
    add_link_options(-fsanitize=${TD_SANITIZE})
    add_compile_definitions(TD_SANITIZED=1)
else()
    add_compile_options($<$<CONFIG:Release>:-D_FORTIFY_SOURCE=2>)
endif()
add_link_options(-Wl,-z,relro,-z,now,-z,noexecstack)

# The commit goes into `tandem version`, HELLO and /version. Empty outside a checkout.
find_package(Git QUIET)
if(GIT_FOUND)
    execute_process(COMMAND ${GIT_EXECUTABLE} rev-parse --short=12 HEAD
        WORKING_DIRECTORY ${CMAKE_SOURCE_DIR} OUTPUT_VARIABLE TD_COMMIT
        OUTPUT_STRIP_TRAILING_WHITESPACE ERROR_QUIET)
endif()
