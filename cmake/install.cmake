# SPDX-License-Identifier: Apache-2.0
# FHS: program, units, configuration, user, documents. Prefix /usr means configuration in /etc.
include(GNUInstallDirs)
if(TARGET tandem)
    install(TARGETS tandem RUNTIME DESTINATION ${CMAKE_INSTALL_BINDIR})
endif()
# All that is installed, without the tests.
get_property(programs DIRECTORY ${CMAKE_CURRENT_SOURCE_DIR}/bench PROPERTY BUILDSYSTEM_TARGETS)
add_custom_target(programs)
foreach(program tandem ${programs})
    if(TARGET ${program})
        add_dependencies(programs ${program})
    endif()
endforeach()

set(deploy ${CMAKE_CURRENT_SOURCE_DIR}/deploy)
set(TD_UNIT_DIR lib/systemd/system CACHE STRING "Where systemd units go, relative to the prefix or absolute")

# Units name the program and its configuration by full path: those of the prefix, which --prefix may still change.
install(CODE "
    set(deploy \"${deploy}\")
    set(unit_dir \"${TD_UNIT_DIR}\")
    set(bin_dir \"${CMAKE_INSTALL_BINDIR}\")
    set(conf_dir \"${CMAKE_INSTALL_SYSCONFDIR}\")
    set(work \"${CMAKE_BINARY_DIR}/deploy\")")
install(CODE [[
    if(CMAKE_INSTALL_PREFIX STREQUAL "/usr" AND NOT IS_ABSOLUTE "${conf_dir}")
        set(conf_dir /${conf_dir})
    endif()
    foreach(dir unit_dir bin_dir conf_dir)
        if(NOT IS_ABSOLUTE "${${dir}}")
            set(${dir} "${CMAKE_INSTALL_PREFIX}/${${dir}}")
        endif()
    endforeach()
    file(GLOB units ${deploy}/systemd/*.service ${deploy}/systemd/*.socket ${deploy}/systemd/*.target)
    foreach(unit ${units})
        get_filename_component(name ${unit} NAME)
        file(READ ${unit} text)
        string(REPLACE "/usr/bin/tandem" "${bin_dir}/tandem" text "${text}")
        string(REPLACE "/etc/tandem/" "${conf_dir}/tandem/" text "${text}")
        file(WRITE ${work}/${name} "${text}")
        file(INSTALL ${work}/${name} DESTINATION "${unit_dir}")
    endforeach()
    file(INSTALL ${deploy}/tandem.conf DESTINATION "${conf_dir}/tandem")]])
install(FILES ${deploy}/systemd/tandem.sysusers DESTINATION lib/sysusers.d RENAME tandem.conf)
install(FILES ${deploy}/systemd/tandem.tmpfiles DESTINATION lib/tmpfiles.d RENAME tandem.conf)

install(FILES ${deploy}/systemd/tandem-remote.conf DESTINATION ${CMAKE_INSTALL_DOCDIR}/examples)
foreach(doc README.md CHANGELOG.md NOTICE)
    install(FILES ${CMAKE_CURRENT_SOURCE_DIR}/${doc} DESTINATION ${CMAKE_INSTALL_DOCDIR} OPTIONAL)
endforeach()
install(DIRECTORY ${CMAKE_CURRENT_SOURCE_DIR}/docs/ DESTINATION ${CMAKE_INSTALL_DOCDIR}/docs)
# Services in other languages generate their clients from these.
install(DIRECTORY ${CMAKE_CURRENT_SOURCE_DIR}/proto/ DESTINATION ${CMAKE_INSTALL_DATADIR}/tandem/proto
    FILES_MATCHING PATTERN "*.proto")
