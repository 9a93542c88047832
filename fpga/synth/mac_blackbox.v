// Stands for rtl/cec_mac.v in area counts: one DSP48E2. yosys would put the cascade's adders and the registers, which
// are inside the DSP, into fabric.
(* blackbox *)
module cec_mac #(
    parameter KW = 8
) (
    input  wire                 clk,
    input  wire signed [7:0]    q0,
    input  wire signed [7:0]    q1,
    input  wire signed [KW-1:0] k,
    input  wire signed [35:0]   pcin,
    output wire signed [35:0]   p
);
endmodule
