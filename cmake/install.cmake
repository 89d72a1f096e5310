# SPDX-License-Identifier: Apache-2.0
# FHS: program, units, configuration, user, documents. Packages use prefix /usr and sysconfdir /etc.
include(GNUInstallDirs)
if(TARGET tandem)
    install(TARGETS tandem RUNTIME DESTINATION ${CMAKE_INSTALL_BINDIR})
endif()

set(deploy ${CMAKE_CURRENT_SOURCE_DIR}/deploy)
set(conf_dir ${CMAKE_INSTALL_FULL_SYSCONFDIR}/tandem)
set(TD_UNIT_DIR lib/systemd/system CACHE STRING "Where systemd units go, relative to the prefix or absolute")

# Units name the program and its configuration by full path: those of this installation.
file(GLOB units ${deploy}/systemd/*.service ${deploy}/systemd/*.socket ${deploy}/systemd/*.target)
foreach(unit ${units})
    get_filename_component(name ${unit} NAME)
    file(READ ${unit} text)
    string(REPLACE "/usr/bin/tandem" "${CMAKE_INSTALL_FULL_BINDIR}/tandem" text "${text}")
    string(REPLACE "/etc/tandem" "${conf_dir}" text "${text}")
    file(CONFIGURE OUTPUT ${CMAKE_BINARY_DIR}/deploy/${name} CONTENT "${text}" @ONLY)
    install(FILES ${CMAKE_BINARY_DIR}/deploy/${name} DESTINATION ${TD_UNIT_DIR})
    set_property(DIRECTORY APPEND PROPERTY CMAKE_CONFIGURE_DEPENDS ${unit})
endforeach()
install(FILES ${deploy}/systemd/tandem.sysusers DESTINATION lib/sysusers.d RENAME tandem.conf)
install(FILES ${deploy}/systemd/tandem.tmpfiles DESTINATION lib/tmpfiles.d RENAME tandem.conf)

install(FILES ${deploy}/tandem.conf DESTINATION ${conf_dir})
install(FILES ${deploy}/systemd/tandem-remote.conf DESTINATION ${CMAKE_INSTALL_DOCDIR}/examples)
foreach(doc README.md CHANGELOG.md NOTICE docs)
    if(EXISTS ${CMAKE_CURRENT_SOURCE_DIR}/${doc})
        if(IS_DIRECTORY ${CMAKE_CURRENT_SOURCE_DIR}/${doc})
            install(DIRECTORY ${CMAKE_CURRENT_SOURCE_DIR}/${doc}/ DESTINATION ${CMAKE_INSTALL_DOCDIR}/docs)
        else()
            install(FILES ${CMAKE_CURRENT_SOURCE_DIR}/${doc} DESTINATION ${CMAKE_INSTALL_DOCDIR})
        endif()
    endif()
endforeach()
# Services in other languages generate their clients from these.
install(DIRECTORY ${CMAKE_CURRENT_SOURCE_DIR}/proto/ DESTINATION ${CMAKE_INSTALL_DATADIR}/tandem/proto FILES_MATCHING PATTERN "*.proto")
