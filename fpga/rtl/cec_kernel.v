// hillinfer's evaluation kernel (HillInfer CEC) as an XRT RTL kernel: exact scores of key codes, and the best of them.
//
// One call scores tokens first .. first + n_tokens - 1 of `heads` KV heads.
//   keys    codes [head][token][HEAD_DIM], heads `key_stride` bytes apart; INT4: the even element in the low half of a
//           byte; two's complement
//   query   int8 [head][G][HEAD_DIM], with INT8 no -128
//   out     for each head, `out_stride` bytes apart: header and data (cec_write.v). Needs 64 + 4*k bytes, or 8 bytes
//           for each entry with modes 1 and 2, rounded up to 64
//   mode    0 the k best positions; 1 the k best <position, score>; 2 every token's <position, score>
// A score is the greatest dot product of the G query heads. k above n_tokens counts as n_tokens. Pointers and strides
// are multiples of LANES bytes, those of out of 64; first * bytes of a token too. Status, in every header and at 0x6c:
//   1 n_tokens above NMAX   2 not aligned   4 no heads, or unknown mode   8 a read failed   16 a write failed
//   32 a query code of -128 (INT8)
// With 1, 2 or 4 nothing is scored and only the first header is written; with a misaligned out not even that.
module cec_kernel #(
    parameter LANES = 64,      // bytes of the memory port
    parameter KW = 8,          // bits of a code: 8 or 4
    parameter HEAD_DIM = 128,
    parameter G = 4,           // query heads of a KV head: 2, 4 or 8
    parameter NMAX = 131072
) (
    input  wire               ap_clk,
    input  wire               ap_rst_n,
    output wire               interrupt,
    input  wire               s_axi_control_awvalid,
    output wire               s_axi_control_awready,
    input  wire [7:0]         s_axi_control_awaddr,
    input  wire               s_axi_control_wvalid,
    output wire               s_axi_control_wready,
    input  wire [31:0]        s_axi_control_wdata,
    input  wire [3:0]         s_axi_control_wstrb,
    output wire               s_axi_control_bvalid,
    input  wire               s_axi_control_bready,
    output wire [1:0]         s_axi_control_bresp,
    input  wire               s_axi_control_arvalid,
    output wire               s_axi_control_arready,
    input  wire [7:0]         s_axi_control_araddr,
    output wire               s_axi_control_rvalid,
    input  wire               s_axi_control_rready,
    output wire [31:0]        s_axi_control_rdata,
    output wire [1:0]         s_axi_control_rresp,
    output wire               m_axi_gmem_awvalid,
    input  wire               m_axi_gmem_awready,
    output wire [63:0]        m_axi_gmem_awaddr,
    output wire [7:0]         m_axi_gmem_awlen,
    output wire [2:0]         m_axi_gmem_awsize,
    output wire [1:0]         m_axi_gmem_awburst,
    output wire [3:0]         m_axi_gmem_awcache,
    output wire [2:0]         m_axi_gmem_awprot,
    output wire               m_axi_gmem_wvalid,
    input  wire               m_axi_gmem_wready,
    output wire [LANES*8-1:0] m_axi_gmem_wdata,
    output wire [LANES-1:0]   m_axi_gmem_wstrb,
    output wire               m_axi_gmem_wlast,
    input  wire               m_axi_gmem_bvalid,
    output wire               m_axi_gmem_bready,
    input  wire [1:0]         m_axi_gmem_bresp,
    output wire               m_axi_gmem_arvalid,
    input  wire               m_axi_gmem_arready,
    output wire [63:0]        m_axi_gmem_araddr,
    output wire [7:0]         m_axi_gmem_arlen,
    output wire [2:0]         m_axi_gmem_arsize,
    output wire [1:0]         m_axi_gmem_arburst,
    output wire [3:0]         m_axi_gmem_arcache,
    output wire [2:0]         m_axi_gmem_arprot,
    input  wire               m_axi_gmem_rvalid,
    output wire               m_axi_gmem_rready,
    input  wire [LANES*8-1:0] m_axi_gmem_rdata,
    input  wire               m_axi_gmem_rlast,
    input  wire [1:0]         m_axi_gmem_rresp
);
    localparam LL = $clog2(LANES);
    localparam TOKB = HEAD_DIM * KW / 8;               // bytes of a token's codes
    localparam LT = $clog2(TOKB);
    localparam TPB = LANES > TOKB ? LANES / TOKB : 1;  // tokens of a beat
    localparam SW = KW + 7 + $clog2(HEAD_DIM);         // |score| <= 127 * 2**(KW-1) * HEAD_DIM
    localparam W = 144 / SW / TPB * TPB;               // scores of a word: two UltraRAMs wide
    localparam NB = $clog2(NMAX + 1);
    localparam BEATB = NB + (LT > LL ? LT - LL : 0) + 1;
    localparam QBEATS = G * HEAD_DIM / LANES;

    wire clk = ap_clk;
    reg rst;
    always @(posedge clk) rst <= ~ap_rst_n;

    assign {s_axi_control_bresp, s_axi_control_rresp} = 0;
    assign {m_axi_gmem_awsize, m_axi_gmem_arsize} = {2{LL[2:0]}};
    assign {m_axi_gmem_awburst, m_axi_gmem_arburst} = {2{2'b01}};
    assign {m_axi_gmem_awcache, m_axi_gmem_arcache} = {2{4'b0011}};
    assign {m_axi_gmem_awprot, m_axi_gmem_arprot} = 0;
    assign m_axi_gmem_wstrb = {LANES{1'b1}};
    assign m_axi_gmem_bready = 1;

    wire ap_start;
    wire [63:0] keys, query, out;
    wire [31:0] first, n_tokens, k, heads, mode, key_stride, out_stride;
    reg [5:0] status;

    // ---- one call
    localparam IDLE = 0, CHECK = 1, START = 2, RUN = 3, DONE = 4;
    reg [2:0] state /*verilator public_flat_rd*/;
    reg empty, all;
    reg [NB-1:0] n_run, k_run;
    reg [15:0] heads_run;
    reg [63:0] keys_run;
    reg [31:0] cycles;
    wire start = state == START;
    wire running, bad_read, bad_query, bad_write;
    wire out_aligned = (out[5:0] | out_stride[5:0]) == 0;
    wire [31:0] first_bytes = first << LT;
    wire aligned = (keys[LL-1:0] | query[LL-1:0] | key_stride[LL-1:0] | first_bytes[LL-1:0]) == 0 && out_aligned;
    always @(posedge clk) begin
        cycles <= cycles + 1'b1;
        if (bad_read) status[3] <= 1;
        if (bad_write) status[4] <= 1;
        if (bad_query) status[5] <= 1;
        case (state)
            IDLE: if (ap_start) begin
                status <= {3'd0, heads[15:0] == 0 || heads[31:16] != 0 || mode > 2, !aligned, n_tokens > NMAX};
                cycles <= 0;
                all <= mode == 2;
                n_run <= n_tokens[NB-1:0];
                k_run <= k < n_tokens ? k[NB-1:0] : n_tokens[NB-1:0];
                keys_run <= keys + (first * TOKB);
                state <= CHECK;
            end
            CHECK: begin
                empty <= status != 0 || n_run == 0 || (k_run == 0 && !all);
                heads_run <= status != 0 ? 16'd1 : heads[15:0];
                state <= out_aligned ? START : DONE;
            end
            START: state <= RUN;
            RUN: if (!running) state <= DONE;
            default: state <= IDLE;
        endcase
        if (rst) state <= IDLE;
    end

    cec_control control (
        .clk(clk), .rst(rst),
        .s_awvalid(s_axi_control_awvalid), .s_awready(s_axi_control_awready), .s_awaddr(s_axi_control_awaddr),
        .s_wvalid(s_axi_control_wvalid), .s_wready(s_axi_control_wready), .s_wdata(s_axi_control_wdata),
        .s_wstrb(s_axi_control_wstrb), .s_bvalid(s_axi_control_bvalid), .s_bready(s_axi_control_bready),
        .s_arvalid(s_axi_control_arvalid), .s_arready(s_axi_control_arready), .s_araddr(s_axi_control_araddr),
        .s_rvalid(s_axi_control_rvalid), .s_rready(s_axi_control_rready), .s_rdata(s_axi_control_rdata),
        .interrupt(interrupt), .ap_start(ap_start), .ap_done(state == DONE),
        .ap_idle(state == IDLE && !ap_start), .status({26'd0, status}),
        .keys(keys), .query(query), .out(out), .first(first), .n_tokens(n_tokens), .k(k), .heads(heads), .mode(mode),
        .key_stride(key_stride), .out_stride(out_stride)
    );

    wire room, claim, q_valid, k_valid, s_valid;
    wire [LANES*8-1:0] data;
    wire [TPB*SW-1:0] scores;
    cec_read #(.LANES(LANES), .KW(KW), .QBEATS(QBEATS), .BEATB(BEATB)) reader (
        .clk(clk), .rst(rst), .start(start && !empty), .heads(heads_run), .keys(keys_run), .query(query),
        .key_stride(key_stride), .key_beats((n_run * TOKB + LANES - 1) >> LL), .room(room), .claim(claim),
        .q_valid(q_valid), .k_valid(k_valid), .data(data), .bad_response(bad_read), .bad_query(bad_query),
        .arvalid(m_axi_gmem_arvalid), .arready(m_axi_gmem_arready), .araddr(m_axi_gmem_araddr),
        .arlen(m_axi_gmem_arlen), .rvalid(m_axi_gmem_rvalid), .rready(m_axi_gmem_rready), .rdata(m_axi_gmem_rdata),
        .rresp(m_axi_gmem_rresp)
    );

    cec_dot #(.LANES(LANES), .KW(KW), .HEAD_DIM(HEAD_DIM), .G(G), .SW(SW), .TPB(TPB)) dot (
        .clk(clk), .rst(rst), .q_valid(q_valid), .k_valid(k_valid), .data(data), .s_valid(s_valid), .s_scores(scores)
    );

    wire e_valid, e_ready, finish, finished;
    wire [NB-1:0] e_position;
    wire [SW-1:0] e_score, threshold;
    cec_topk #(.SW(SW), .TPB(TPB), .NMAX(NMAX), .W(W), .NB(NB)) topk (
        .clk(clk), .rst(rst), .n(n_run), .k(k_run), .all(all), .empty(empty), .start(start), .heads(heads_run),
        .running(running), .room(room), .claim(claim), .s_valid(s_valid), .s_scores(scores), .e_valid(e_valid),
        .e_ready(e_ready), .e_position(e_position), .e_score(e_score), .threshold(threshold), .finish(finish),
        .finished(finished)
    );

    cec_write #(.LANES(LANES)) writer (
        .clk(clk), .rst(rst), .start(start), .out(out), .out_stride(out_stride), .pairs(mode != 0),
        .e_valid(e_valid), .e_ready(e_ready), .e_position(first + e_position),
        .e_score({{(32-SW){e_score[SW-1]}}, e_score}), .finish(finish), .finished(finished),
        .threshold({{(32-SW){threshold[SW-1]}}, threshold}), .status({26'd0, status}), .cycles(cycles),
        .bad_response(bad_write),
        .awvalid(m_axi_gmem_awvalid), .awready(m_axi_gmem_awready), .awaddr(m_axi_gmem_awaddr),
        .awlen(m_axi_gmem_awlen), .wvalid(m_axi_gmem_wvalid), .wready(m_axi_gmem_wready), .wdata(m_axi_gmem_wdata),
        .wlast(m_axi_gmem_wlast), .bvalid(m_axi_gmem_bvalid), .bresp(m_axi_gmem_bresp)
    );
endmodule
