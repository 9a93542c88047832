// Streaming dot products: LANES bytes of key codes a cycle against G query heads, and the best head's score.
// It never stalls: what enters comes out LATENCY cycles later.
//
// A beat holds E codes: EP of one token's HEAD_DIM (BEATS beats a token), or TPB whole tokens.
// Query load: beats of LANES int8 in the order [head][element].
module cec_dot #(
    parameter LANES = 64,
    parameter KW = 8,
    parameter HEAD_DIM = 128,
    parameter G = 4,
    parameter SW = 22,
    parameter TPB = 1
) (
    input  wire               clk,
    input  wire               rst,
    input  wire               q_valid,
    input  wire               k_valid,
    input  wire [LANES*8-1:0] data,
    output wire               s_valid,
    output wire [TPB*SW-1:0]  s_scores
);
    localparam E = LANES * 8 / KW;
    localparam EP = E / TPB;
    localparam BEATS = HEAD_DIM / EP;
    localparam CH = KW == 8 ? 8 : 16;  // codes summed in one DSP cascade: CH * 127 * 2**(KW-1) < 2**17
    localparam NC = EP / CH;
    localparam LNC = $clog2(NC);
    localparam LEAFW = 18 + LNC;  // one beat's sum
    localparam LG = $clog2(G);
    localparam PARTS = EP / LANES > 0 ? EP / LANES : 1;  // query beats of one head and phase
    localparam BB = BEATS > 1 ? $clog2(BEATS) : 1;

    wire beat_valid, beat_last;  // beside `total` below
    reg first;                   // of a token's beats

    // Query: where a loaded beat goes.
    reg [3:0] q_part, q_phase, q_head;
    always @(posedge clk)
        if (rst) begin
            q_part <= 0;
            q_phase <= 0;
            q_head <= 0;
        end else if (q_valid) begin
            q_part <= q_part == PARTS - 1 ? 0 : q_part + 1'b1;
            if (q_part == PARTS - 1) begin
                q_phase <= q_phase == BEATS - 1 ? 0 : q_phase + 1'b1;
                if (q_phase == BEATS - 1) q_head <= q_head == G - 1 ? 0 : q_head + 1'b1;
            end
        end

    // Keys: one register, then a delay of i cycles for place i of a cascade, with the phase beside it.
    reg [LANES*8-1:0] key;
    reg [BB-1:0] phase, phase_in;
    reg valid0, last0;
    always @(posedge clk) begin
        key <= data;
        phase <= phase_in;
        valid0 <= k_valid & ~rst;
        last0 <= phase_in == BEATS - 1;
        if (rst) phase_in <= 0;
        else if (k_valid) phase_in <= phase_in == BEATS - 1 ? 0 : phase_in + 1'b1;
    end

    genvar s, g, i, p, c, t, l, h;
    generate
        for (s = 0; s < CH; s = s + 1) begin : skew
            wire [BB-1:0] ph;
            wire [E/CH*KW-1:0] k;  // codes s, s + CH, s + 2*CH ...
            wire [E/CH*KW-1:0] k0;
            for (i = 0; i < E / CH; i = i + 1) begin : pick
                assign k0[i*KW +: KW] = key[(i*CH + s)*KW +: KW];
            end
            cec_delay #(.WIDTH(BB), .N(s)) dp (.clk(clk), .rst(1'b0), .d(phase), .q(ph));
            cec_delay #(.WIDTH(E/CH*KW), .N(s)) dk (.clk(clk), .rst(1'b0), .d(k0), .q(k));
            wire [G*EP/CH*8-1:0] q;  // [head][code of this place]
            for (g = 0; g < G; g = g + 1) begin : head
                for (p = 0; p < PARTS; p = p + 1) begin : part
                    wire [LANES/CH*8-1:0] d;
                    for (i = 0; i < LANES / CH; i = i + 1) begin : pick
                        assign d[i*8 +: 8] = data[(i*CH + s)*8 +: 8];
                    end
                    wire here = q_valid && q_head == g && q_part == p;
                    if (BEATS == 1) begin : fixed
                        reg [LANES/CH*8-1:0] r;
                        always @(posedge clk) if (here) r <= d;
                        assign q[(g*EP/CH + p*LANES/CH)*8 +: LANES/CH*8] = r;
                    end else begin : turning
                        (* ram_style = "distributed" *) reg [LANES/CH*8-1:0] r [0:BEATS-1];
                        always @(posedge clk) if (here) r[q_phase[BB-1:0]] <= d;
                        assign q[(g*EP/CH + p*LANES/CH)*8 +: LANES/CH*8] = r[ph];
                    end
                end
            end
        end

        for (t = 0; t < TPB; t = t + 1) begin : slice
            wire [G*LEAFW-1:0] total;  // sums of a beat, by head
            for (p = 0; p < G / 2; p = p + 1) begin : pair
                wire [NC*18-1:0] low, high;
                for (c = 0; c < NC; c = c + 1) begin : chain
                    for (i = 0; i < CH; i = i + 1) begin : lane
                        wire signed [35:0] p_in, p_out;
                        if (i == 0) assign p_in = 0;
                        else assign p_in = lane[i-1].p_out;
                        cec_mac #(.KW(KW)) mac (
                            .clk(clk),
                            .q0(skew[i].q[(2*p*EP/CH + c)*8 +: 8]),
                            .q1(skew[i].q[((2*p + 1)*EP/CH + c)*8 +: 8]),
                            .k(skew[i].k[(t*NC + c)*KW +: KW]),
                            .pcin(p_in),
                            .p(p_out)
                        );
                    end
                    reg [17:0] lo, hi;
                    always @(posedge clk) begin
                        lo <= lane[CH-1].p_out[17:0];
                        hi <= lane[CH-1].p_out[35:18] + lane[CH-1].p_out[17];  // the low half borrowed one
                    end
                    assign low[c*18 +: 18] = lo;
                    assign high[c*18 +: 18] = hi;
                end
                cec_sum #(.N(NC), .W(18)) add0 (.clk(clk), .d(low), .q(total[2*p*LEAFW +: LEAFW]));
                cec_sum #(.N(NC), .W(18)) add1 (.clk(clk), .d(high), .q(total[(2*p + 1)*LEAFW +: LEAFW]));
            end
            wire [G*SW-1:0] sums;  // of a token, by head
            for (h = 0; h < G; h = h + 1) begin : token
                wire signed [LEAFW-1:0] part = total[h*LEAFW +: LEAFW];
                if (BEATS == 1) assign sums[h*SW +: SW] = part;
                else begin : many
                    reg signed [SW-1:0] sum;
                    always @(posedge clk) if (beat_valid) sum <= first ? part : sum + part;
                    assign sums[h*SW +: SW] = sum;
                end
            end
            cec_max #(.N(G), .W(SW)) best (.clk(clk), .d(sums), .q(s_scores[t*SW +: SW]));
        end
    endgenerate

    // Valid and last-of-token flags beside the data: cascade, unpacking, sums; then accumulation and the best head.
    cec_delay #(.WIDTH(2), .N(CH + 4 + LNC), .RESET(1)) flags (
        .clk(clk), .rst(rst), .d({valid0, last0}), .q({beat_valid, beat_last}));
    always @(posedge clk)
        if (rst) first <= 1;
        else if (beat_valid) first <= beat_last;
    cec_delay #(.WIDTH(1), .N(LG + (BEATS > 1)), .RESET(1)) out (
        .clk(clk), .rst(rst), .d(beat_valid & beat_last), .q(s_valid));
endmodule

// N cycles late. Without RESET it maps to shift-register LUTs.
module cec_delay #(
    parameter WIDTH = 1,
    parameter N = 1,
    parameter RESET = 0
) (
    input  wire             clk,
    input  wire             rst,
    input  wire [WIDTH-1:0] d,
    output wire [WIDTH-1:0] q
);
    generate
        if (N == 0) assign q = d;
        else begin : some
            reg [WIDTH*N-1:0] line;
            wire [WIDTH*(N+1)-1:0] longer = {line, d};
            always @(posedge clk)
                if (RESET && rst) line <= 0;
                else line <= longer[WIDTH*N-1:0];
            assign q = line[WIDTH*N-1 -: WIDTH];
        end
    endgenerate
endmodule

// Sum of N = 2**L signed numbers, one register a level; L cycles.
module cec_sum #(
    parameter N = 8,
    parameter W = 18
) (
    input  wire                     clk,
    input  wire [N*W-1:0]           d,
    output wire [W+$clog2(N)-1:0]   q
);
    genvar i;
    generate
        if (N == 1) assign q = d;
        else begin : level
            reg [N/2*(W+1)-1:0] r;
            for (i = 0; i < N / 2; i = i + 1) begin : add
                wire signed [W-1:0] a = d[2*i*W +: W], b = d[(2*i + 1)*W +: W];
                always @(posedge clk) r[i*(W+1) +: W+1] <= a + b;
            end
            cec_sum #(.N(N/2), .W(W+1)) rest (.clk(clk), .d(r), .q(q));
        end
    endgenerate
endmodule

// Greatest of N = 2**L signed numbers, one register a level; L cycles.
module cec_max #(
    parameter N = 4,
    parameter W = 22
) (
    input  wire             clk,
    input  wire [N*W-1:0]   d,
    output wire [W-1:0]     q
);
    genvar i;
    generate
        if (N == 1) assign q = d;
        else begin : level
            reg [N/2*W-1:0] r;
            for (i = 0; i < N / 2; i = i + 1) begin : choose
                wire signed [W-1:0] a = d[2*i*W +: W], b = d[(2*i + 1)*W +: W];
                always @(posedge clk) r[i*W +: W] <= a > b ? a : b;
            end
            cec_max #(.N(N/2), .W(W)) rest (.clk(clk), .d(r), .q(q));
        end
    endgenerate
endmodule
