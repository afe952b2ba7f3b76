# find_package(autosteer): the target autosteer::shared, also called autosteer::autosteer.
# find_package(autosteer COMPONENTS static): autosteer::static as well, which needs the libraries below.
foreach(component IN LISTS autosteer_FIND_COMPONENTS)
  if(NOT component MATCHES "^(shared|static)$")
    set(autosteer_FOUND FALSE)
    set(autosteer_NOT_FOUND_MESSAGE "its components are shared and static; it has no '${component}'")
    return()
  endif()
endforeach()
include(CMakeFindDependencyMacro)
include("${CMAKE_CURRENT_LIST_DIR}/autosteer-shared.cmake")
if(NOT TARGET autosteer::autosteer)
  add_library(autosteer::autosteer ALIAS autosteer::shared)
endif()
if("static" IN_LIST autosteer_FIND_COMPONENTS)
  find_dependency(Threads)
  find_dependency(OpenSSL COMPONENTS Crypto)
  find_dependency(PNG)
  find_dependency(JPEG)
  find_dependency(PkgConfig)
  pkg_check_modules(autosteer_needs REQUIRED IMPORTED_TARGET oniguruma libutf8proc)
  include("${CMAKE_CURRENT_LIST_DIR}/autosteer-static.cmake")
  set_property(
    TARGET autosteer::static
    APPEND
    PROPERTY INTERFACE_LINK_LIBRARIES OpenSSL::Crypto PNG::PNG JPEG::JPEG PkgConfig::autosteer_needs Threads::Threads
             ${CMAKE_DL_LIBS} stdc++ m)
endif()
