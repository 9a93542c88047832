# The RTL as an XRT kernel object: vivado -mode batch -source package.tcl -tclargs OUT.xo IP_DIR BITS HEAD_DIM GROUP LANES
# Never run by us: written for Vivado 2021.2 after UG1393 and Xilinx's RTL kernel examples.
lassign $argv xo ip bits head_dim group lanes
set here [file dirname [file normalize [info script]]]
create_project -force kernel $ip.project -part xcku15p-ffva1156-2LV-e
add_files [glob $here/../rtl/*.v]
set_property top cec_kernel [current_fileset]
update_compile_order -fileset sources_1
ipx::package_project -root_dir $ip -vendor hillinfer -library kernel -taxonomy /KernelIP -import_files -set_current true
set core [ipx::current_core]
foreach {name value} [list KW $bits HEAD_DIM $head_dim G $group LANES $lanes] {
    set_property value $value [ipx::get_user_parameters $name -of_objects $core]
    set_property value $value [ipx::get_hdl_parameters $name -of_objects $core]
}
foreach bus {m_axi_gmem s_axi_control} { ipx::associate_bus_interfaces -busif $bus -clock ap_clk $core }

set map [ipx::get_memory_maps s_axi_control -of_objects $core]
if {$map eq ""} { set map [ipx::add_memory_map s_axi_control $core] }
set_property slave_memory_map_ref s_axi_control [ipx::get_bus_interfaces s_axi_control -of_objects $core]
set block [ipx::get_address_blocks -of_objects $map]
if {$block eq ""} { set block [ipx::add_address_block reg0 $map] }
foreach {name at size} {
    CTRL 0x00 32  GIER 0x04 32  IP_IER 0x08 32  IP_ISR 0x0c 32
    keys 0x10 64  query 0x1c 64  out 0x28 64
    first 0x34 32  n_tokens 0x3c 32  k 0x44 32  heads 0x4c 32  mode 0x54 32  key_stride 0x5c 32  out_stride 0x64 32
} {
    set register [ipx::add_register $name $block]
    set_property address_offset $at $register
    set_property size $size $register
    if {$size == 64} {
        ipx::add_register_parameter ASSOCIATED_BUSIF $register
        set_property value m_axi_gmem [ipx::get_register_parameters ASSOCIATED_BUSIF -of_objects $register]
    }
}
foreach {name value} {HAS_BURST 0 SUPPORTS_NARROW_BURST 0} {
    set bus [ipx::get_bus_interfaces m_axi_gmem -of_objects $core]
    set_property value $value [ipx::add_bus_parameter $name $bus]
}
set_property sdx_kernel true $core
set_property sdx_kernel_type rtl $core
set_property xpm_libraries {XPM_CDC XPM_MEMORY XPM_FIFO} $core
set_property supported_families {} $core
set_property auto_family_support_level level_2 $core
ipx::create_xgui_files $core
ipx::update_checksums $core
ipx::save_core $core
file delete -force $xo
package_xo -xo_path $xo -kernel_name cec_kernel -ip_directory $ip -ctrl_protocol ap_ctrl_hs
