// One DSP48E2: two query heads times one key code, added to what the DSP before it in the cascade has.
// The heads of a GQA group share their key, so both ride in one multiplier, 18 bits apart: p = (q1 * k) << 18 + q0 * k.
// Registers are those inside the DSP: A and D, pre-adder, M, P.
(* use_dsp = "yes" *)
module cec_mac #(
    parameter KW = 8
) (
    input  wire                 clk,
    input  wire signed [7:0]    q0,
    input  wire signed [7:0]    q1,
    input  wire signed [KW-1:0] k,
    input  wire signed [35:0]   pcin,
    output reg  signed [35:0]   p
);
    reg signed [7:0] d0, a1;
    reg signed [KW-1:0] b1, b2;
    reg signed [26:0] ad;
    reg signed [35:0] m;

    always @(posedge clk) begin
        d0 <= q0;
        a1 <= q1;
        b1 <= k;
        ad <= $signed({a1, 18'd0}) + d0;
        b2 <= b1;
        m <= ad * b2;
        p <= m + pcin;
    end
endmodule
