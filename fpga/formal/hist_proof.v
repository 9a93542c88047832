// cec_hist against a counter of one bin, any: a walk reads exactly the increments since the last walk over it.
// Assumed of its user, and true of cec_topk: no increment in, right before or right after a cycle with a walk,
// and no bin walked over in two cycles running.
module hist_proof (
    input wire       clk,
    input wire       inc,
    input wire       bin,
    input wire       walk,
    input wire       walk_bin
);
    wire [2:0] count;
    cec_hist #(.LOG2(1), .WIDTH(3)) dut (
        .clk(clk), .inc(inc), .bin(bin), .walk(walk), .walk_bin(walk_bin), .count(count));

    (* anyconst *) wire chosen;
    reg [2:0] counted, expected;
    reg last_walk_bin;
    reg known = 0, check = 0, was_inc = 0, was_walk = 0;
    always @(posedge clk) begin
        assume (!(walk && (inc || was_inc)));
        assume (!(was_walk && inc));
        assume (!(was_walk && walk && walk_bin == last_walk_bin));
        last_walk_bin <= walk_bin;
        was_inc <= inc;
        was_walk <= walk;
        if (inc && bin == chosen) counted <= counted + 1'b1;
        check <= known && walk && walk_bin == chosen;
        expected <= counted;
        if (walk && walk_bin == chosen) begin
            known <= 1;
            counted <= 0;
        end
        if (check) assert (count == expected);
        cover (check && expected == 3);
    end
endmodule
