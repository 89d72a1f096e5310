# SPDX-License-Identifier: Apache-2.0
include(GNUInstallDirs)
if(TARGET tandem)
    install(TARGETS tandem RUNTIME DESTINATION ${CMAKE_INSTALL_BINDIR})
endif()
